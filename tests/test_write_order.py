"""The order of writes: whatever instant the power fails at, and whichever call fails, the image is
sound (at worst clusters leak) and every flushed byte is there."""

import errno
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.qemu import check_clean, compare_bytes, qemu_check, qemu_img
from support.recorder import Recorder
from support.stamps import stamped

import qcow2x
from qcow2x.errors import ImageBroken

KiB = 1 << 10

SHAPES: dict[str, dict[str, Any]] = {
    "512": {"cluster_size": 512},
    "512-rc64": {"cluster_size": 512, "refcount_bits": 64},
    "512-rc1": {"cluster_size": 512, "refcount_bits": 1},
    "v2": {"cluster_size": 1024, "compat": "0.10"},
    "4096": {"cluster_size": 4096, "compression_type": "zstd"},
    "extl2": {"cluster_size": 16384, "extended_l2": True},
}


class Session:
    """A guest at work on a recorded storage, and what each sector may hold after a crash."""

    def __init__(self, recorder: Recorder, seed: str, **options: Any) -> None:
        self.recorder = recorder
        self.random = random.Random(seed)
        self.image = qcow2x.open(recorder, "r+", **options)
        self.durable_at_return = options.get("cache") in ("writethrough", "directsync")
        self.sequence = 0
        size = self.image.size
        self.model = bytearray(self.image.pread(size, 0))
        # Per sector: (log length at which it may be there, log length at which older ones are
        # gone for good, its bytes).
        self.history: list[list[list]] = [
            [[0, 0, bytes(self.model[at : at + 512])]] for at in range(0, size, 512)
        ]

    def actions(self) -> list[Callable[[], None]]:
        return [
            self.write,
            self.write,
            self.write,
            self.compress,
            self.discard,
            self.zero,
            self.flush,
        ]

    def step(self) -> None:
        self.random.choice(self.actions())()

    def _range(self, align: int) -> tuple[int, int]:
        size = self.image.size
        offset = self.random.randrange(size) // align * align
        length = self.random.choice([512, 1024, 2048, 3 * self.image.cluster_size])
        return offset, min(max(align, length // align * align), size - offset)

    def _put(self, began: int, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        for at in range(0, len(data), 512):
            self.history[(offset + at) // 512].append([began, None, data[at : at + 512]])
        if self.durable_at_return:
            self._settled()

    def _settled(self) -> None:
        now = len(self.recorder.log)
        for versions in self.history:
            for version in versions:
                if version[1] is None:
                    version[1] = now

    def write(self) -> None:
        offset, length = self._range(512)
        self.sequence += 1
        data = stamped(offset, length, self.sequence)
        began = len(self.recorder.log)
        self.image.pwrite(data, offset)
        self._put(began, offset, data)

    def compress(self) -> None:
        offset, length = self._range(self.image.cluster_size)
        self.sequence += 1
        data = stamped(offset, length, self.sequence)
        began = len(self.recorder.log)
        self.image.pwrite_compressed(data, offset)
        self._put(began, offset, data)

    def discard(self) -> None:
        offset, length = self._range(self.image.cluster_size)
        began = len(self.recorder.log)
        self.image.discard(offset, length)
        got = self.image.pread(length, offset)
        assert got in (bytes(length), bytes(self.model[offset : offset + length]))
        self._put(began, offset, got)

    def zero(self) -> None:
        offset, length = self._range(512)
        began = len(self.recorder.log)
        self.image.write_zeroes(offset, length, unmap=self.random.random() < 0.5)
        self._put(began, offset, bytes(length))

    def flush(self) -> None:
        self.image.flush()
        self._settled()

    def assert_plausible(self, happened: int, content: bytes) -> None:
        """Every sector holds its last durable bytes or something written since."""
        for n, versions in enumerate(self.history):
            got = content[n * 512 : n * 512 + 512]
            allowed = []
            for began, settled, data in reversed(versions):
                if began <= happened:
                    allowed.append(data)
                    if settled is not None and settled <= happened:
                        break
            assert got in allowed, (
                f"after {happened} calls sector {n} holds {got[:16].hex()}, "
                f"not one of {[a[:16].hex() for a in allowed]}"
            )


def fresh(path: Path, **options: Any) -> Recorder:
    """An empty image with some old data in it, recorded from here on."""
    qcow2x.create(path, 96 * KiB, **options)
    with qcow2x.open(path, "r+", references="follow") as image:
        image.pwrite(stamped(0, 40 * KiB, 1 << 40), 0)
        cluster = image.cluster_size
        image.pwrite_compressed(stamped(64 * KiB, cluster, 1 << 40), 64 * KiB)
    return Recorder(path.read_bytes())


def survives(state: bytes, session: Session, happened: int, **options: Any) -> None:
    with qcow2x.open(Recorder(state), **options) as image:
        found = image.check()
        bad = [f for f in found.findings if f.kind != "leak"]
        assert not found.corruptions and not found.check_errors, (happened, bad)
        session.assert_plausible(happened, image.pread(image.size, 0))


@pytest.mark.leaks("power was cut")
@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cut_of_power_at_any_instant(tmp_path: Path, shape: str, cache: str) -> None:
    recorder = fresh(tmp_path / "disk.qcow2", **SHAPES[shape])
    session = Session(recorder, shape, cache=cache)
    for _ in range(40):
        session.step()
    session.image.close()
    session._settled()
    rng = random.Random(shape)
    states = 0
    for happened, state in recorder.crashes(rng, 2):
        survives(state, session, happened)
        states += 1
        # QEMU is slower to ask; it agrees on a sample.
        if states % 40 == 0:
            path = tmp_path / "crashed.qcow2"
            path.write_bytes(state)
            found = qemu_check(path)
            assert not found.get("corruptions") and not found["check-errors"], found
    assert states > 100
    path = tmp_path / "end.qcow2"
    path.write_bytes(recorder.data)
    check_clean(path)
    compare_bytes(path, session.model)


@pytest.mark.leaks("power was cut")
def test_a_cut_of_power_with_a_snapshot_and_a_backing_file(tmp_path: Path) -> None:
    """Copies of what a snapshot shares, over a backing file that shows through."""
    base = tmp_path / "base.raw"
    base.write_bytes(stamped(0, 96 * KiB, 7 << 40))
    path = tmp_path / "disk.qcow2"
    fresh(path, cluster_size=512, backing_file="base.raw", backing_format="raw")
    qemu_img("snapshot", "-c", "before", path)
    recorder = Recorder(path.read_bytes())
    with qcow2x.open(path, references="follow") as image:
        kept = image.pread(image.size, 0)
    backing = qcow2x.FileStorage(base)
    session = Session(recorder, "snapshot", backing=backing)
    for _ in range(40):
        session.step()
    session.image.close()
    session._settled()
    rng = random.Random(1)
    for n, (happened, state) in enumerate(recorder.crashes(rng, 2)):
        survives(state, session, happened, backing=backing)
        if n % 60 == 0:
            crashed = tmp_path / "crashed.qcow2"
            crashed.write_bytes(state)
            out = tmp_path / "snapshot.raw"
            qemu_img("convert", "-l", "before", "-f", "qcow2", "-O", "raw", crashed, out)
            assert out.read_bytes() == kept


def test_a_cut_of_power_while_the_disk_is_resized(tmp_path: Path) -> None:
    """Old bytes never come back past an end that was moved away and back."""
    path = tmp_path / "disk.qcow2"
    recorder = fresh(path, cluster_size=512)
    image = qcow2x.open(recorder, "r+")
    image.flush()
    sizes = [(0, 96 * KiB)]
    for size in (40 * KiB + 512, 300 * KiB, 20 * KiB, 96 * KiB):
        began = len(recorder.log)
        image.resize(size, shrink=True)
        sizes.append((began, size))
        image.pwrite(stamped(size - 4096, 4096, 5), size - 4096)
        image.flush()
    image.close()
    for happened, state in recorder.crashes(random.Random(3), 2):
        with qcow2x.open(Recorder(state)) as crashed:
            found = crashed.check()
            assert not found.corruptions and not found.check_errors, (happened, found.findings)
            reached = [size for began, size in sizes if began <= happened]
            assert crashed.size in reached[-2:]
            if crashed.size == 300 * KiB:
                # Between the cut at 40 KiB and the new end only our own marks or zeros.
                data = crashed.pread(256 * KiB - 512 - 4096, 40 * KiB + 512)
                assert not any(data)


# ---- The order itself ----


def test_refcount_then_mapping_then_table_each_behind_a_barrier(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 4 << 20)
    recorder = Recorder(path.read_bytes())
    at = {"header": 0, "reftable": 65536, "refblock": 131072, "l1": 196608}
    with qcow2x.open(recorder, "r+") as image:
        image.pwrite(b"d" * 65536, 0)
        (data,) = [extent.host_offset for extent in image.extents(0, 65536)]
        image.flush()
        kinds = []
        for entry in recorder.log:
            if entry[0] == "flush":
                kinds.append("flush")
                continue
            place = entry[1]
            known = [name for name, start in at.items() if start <= place < start + 65536]
            if data <= place < data + 65536:
                known = ["data"]
            kinds.extend(known or ["l2"])
    steps = [name for name, _ in itertools.groupby(kinds)]
    # The L2 table is new: it is written once, all zeros, when it is made, and is then behind the
    # first barrier. So the L1 entry may follow the L2 entry without another.
    assert steps == ["l2", "data", "refblock", "flush", "l2", "l1", "flush"]


def test_rewriting_touches_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20)
    recorder = Recorder(path.read_bytes())
    with qcow2x.open(recorder, "r+") as image:
        image.pwrite(b"d" * (1 << 20), 0)
        image.flush()
        recorder.log.clear()
        for n in range(20):
            image.pwrite(bytes([n]) * 4096, n * 8192)
        assert [entry[0] for entry in recorder.log] == ["write"] * 20
        image.flush()
        assert [entry[0] for entry in recorder.log[20:]] == ["flush"]


@pytest.mark.parametrize("how", ["fua", "writethrough", "directsync"])
def test_durable_at_return(tmp_path: Path, how: str) -> None:
    """Nothing is left to flush when a durable write has returned."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20)
    recorder = Recorder(path.read_bytes())
    fua = how == "fua"
    image = qcow2x.open(recorder, "r+", cache="writeback" if fua else how)
    for n, (offset, length) in enumerate([(0, 512), (65536, 70000), (100, 3), (300_000, 1)]):
        data = bytes([n + 1]) * length
        image.pwrite(data, offset, fua=fua)
        assert recorder.log[-1] == ("flush",)
        state = Recorder(recorder.data)
        with qcow2x.open(state) as crashed:
            assert crashed.pread(length, offset) == data
    image.close()


def test_unsafe_never_waits(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20)
    recorder = Recorder(path.read_bytes())
    with qcow2x.open(recorder, "r+", cache="unsafe") as image:
        image.pwrite(b"x" * 200_000, 0)
        image.flush()
    assert ("flush",) not in recorder.log
    (tmp_path / "end.qcow2").write_bytes(recorder.data)
    check_clean(tmp_path / "end.qcow2")


def test_freed_space_is_punched_only_after_the_flush(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20)
    recorder = Recorder(path.read_bytes())
    with qcow2x.open(recorder, "r+") as image:
        image.pwrite(b"x" * (1 << 19), 0)
        image.flush()
        recorder.log.clear()
        image.discard(0, 1 << 19)
        assert not [entry for entry in recorder.log if entry[0] == "punch"]
        image.flush()
        kinds = [entry[0] for entry in recorder.log]
        assert "punch" in kinds
        assert "flush" in kinds[: kinds.index("punch")]


# ---- Calls that fail ----


def count_calls(start: bytes, work: Callable[[qcow2x.Image], object]) -> int:
    recorder = Recorder(start)
    image = qcow2x.open(recorder, "r+")
    before = recorder.calls
    work(image)
    image.close()
    return recorder.calls - before


def busy(image: qcow2x.Image) -> None:
    cluster = image.cluster_size
    image.pwrite(stamped(1024, 9 * KiB, 11), 1024)
    image.pwrite_compressed(stamped(16 * KiB, cluster, 12), 16 * KiB)
    image.flush()
    image.discard(0, 4 * cluster)
    image.flush()
    image.write_zeroes(20 * KiB, 700, unmap=True)
    image.pwrite(stamped(44 * KiB, 30 * KiB, 13), 44 * KiB)
    image.flush()


@pytest.mark.parametrize("shape", ["512", "v2", "4096", "512-rc64"])
def test_any_call_fails_for_good(tmp_path: Path, shape: str) -> None:
    """EIO from the k-th call on: it comes out of the verb or of close, and the file at worst leaks."""
    start = bytes(fresh(tmp_path / "disk.qcow2", **SHAPES[shape]).data)
    total = count_calls(start, busy)
    for k in range(1, total + 1):
        recorder = Recorder(start)
        image = qcow2x.open(recorder, "r+")
        recorder.failing = range(recorder.calls + k, 1 << 30)
        failed = None
        try:
            busy(image)
        except OSError as exc:
            failed = exc
            # Reading goes on.
            assert len(image.pread(image.size, 0)) == image.size
        # A close that cannot flush says so.
        with pytest.raises(OSError) as info:
            image.close()
        assert errno.EIO in (info.value.errno, failed and failed.errno), k
        with qcow2x.open(Recorder(recorder.data)) as again:
            found = again.check()
            assert not found.corruptions and not found.check_errors, (k, found.findings)


@pytest.mark.parametrize("shape", ["512", "v2", "4096", "512-rc64"])
def test_any_call_finds_no_room_and_is_repeated(tmp_path: Path, shape: str) -> None:
    """ENOSPC once at the k-th call: it comes out, the same calls again work, nothing is lost."""
    start = bytes(fresh(tmp_path / "disk.qcow2", **SHAPES[shape]).data)
    total = count_calls(start, busy)
    with qcow2x.open(Recorder(start), "r+") as image:
        busy(image)
        model = image.pread(image.size, 0)
    for k in range(1, total + 1):
        recorder = Recorder(start)
        image = qcow2x.open(recorder, "r+")
        recorder.failing = range(recorder.calls + k, recorder.calls + k + 1)
        recorder.error = errno.ENOSPC
        for verb in (busy, qcow2x.Image.flush, qcow2x.Image.close):
            try:
                verb(image)
            except OSError as exc:
                assert exc.errno == errno.ENOSPC, (k, exc)
                verb(image)
        with qcow2x.open(Recorder(recorder.data)) as again:
            found = again.check()
            assert not found.corruptions and not found.check_errors, (k, found.findings)
            assert again.pread(again.size, 0) == model, k


class SyncFails(Recorder):
    sync_fails = False

    def flush(self) -> None:
        if self.sync_fails:
            raise OSError(errno.EIO, "this storage was told to fail")
        super().flush()


@pytest.mark.parametrize("shape", ["512", "v2", "4096", "512-rc64"])
def test_any_metadata_write_fails_and_is_tried_again(tmp_path: Path, shape: str) -> None:
    """EIO of one write of a flush: the flush says so, the next one brings everything to the file."""
    start = bytes(fresh(tmp_path / "disk.qcow2", **SHAPES[shape]).data)

    def change(recorder: Recorder) -> qcow2x.Image:
        image = qcow2x.open(recorder, "r+")
        image.pwrite(stamped(60 * KiB, 8 * KiB, 3), 60 * KiB)
        image.discard(0, 4 * KiB)
        return image

    recorder = Recorder(start)
    with change(recorder) as image:
        begun = len(recorder.log)
        image.flush()
        calls = [entry[0] for entry in recorder.log[begun:]]
        model = image.pread(image.size, 0)
    assert calls.count("write") > 1
    for k in [k for k, call in enumerate(calls, 1) if call == "write"]:
        recorder = Recorder(start)
        image = change(recorder)
        recorder.failing = range(recorder.calls + k, recorder.calls + k + 1)
        with pytest.raises(OSError) as info:
            image.flush()
        assert info.value.errno == errno.EIO and not isinstance(info.value, ImageBroken)
        image.pwrite(b"more", 0)
        image.flush()
        assert image.pread(image.size, 0) == b"more" + model[4:]
        flushed = len(recorder.log)
        image.close()
        for happened, left in recorder.crashes(random.Random(k), 4):
            with qcow2x.open(Recorder(left)) as again:
                found = again.check()
                assert not found.corruptions and not found.check_errors, (k, found.findings)
                if happened >= flushed:
                    assert again.pread(again.size, 0) == b"more" + model[4:]


def test_a_header_that_may_not_have_been_written(tmp_path: Path) -> None:
    """A longer L1 table is not taken into use: the next flush makes sure that the header is the old
    one before it writes anything else, and then frees the new place."""
    start = bytes(fresh(tmp_path / "disk.qcow2", cluster_size=512).data)
    recorder = Recorder(start)
    image = qcow2x.open(recorder, "r+")
    recorder.fail_header = True

    def pwrite(buffer: bytes, offset: int) -> int:
        if offset == 0 and recorder.fail_header:
            recorder.fail_header = False
            # It arrives, and nobody learns of that.
            Recorder.pwrite(recorder, buffer, offset)
            raise OSError(errno.EIO, "this storage was told to fail")
        return Recorder.pwrite(recorder, buffer, offset)

    recorder.pwrite = pwrite
    image.close()
    image = qcow2x.open(recorder, "r+")
    with pytest.raises(OSError):
        image.resize(64 << 20)
    size = image.size
    image.pwrite(stamped(0, 4 * KiB, 8), 0)
    begun = len(recorder.log)
    image.flush()
    first = next(entry for entry in recorder.log[begun:] if entry[0] == "write")
    assert first[1] == 0 and recorder.data[:512] == start[:512]
    image.close()
    with qcow2x.open(Recorder(recorder.data)) as again:
        assert again.size == size and again.pread(4 * KiB, 0) == stamped(0, 4 * KiB, 8)
        assert again.check().clean


def test_a_broken_image_says_so(tmp_path: Path) -> None:
    recorder = SyncFails(fresh(tmp_path / "disk.qcow2", cluster_size=512).data)
    image = qcow2x.open(recorder, "r+")
    image.pwrite(b"q" * 4096, 60 * KiB)
    recorder.sync_fails = True
    with pytest.raises(OSError) as info:
        image.flush()
    assert info.value.errno == errno.EIO
    recorder.sync_fails = False
    for verb in (
        lambda: image.pwrite(b"x", 0),
        lambda: image.discard(0, 512),
        lambda: image.write_zeroes(0, 512),
        lambda: image.pwrite_compressed(bytes(512), 0),
        lambda: image.resize(1 << 20),
        image.flush,
    ):
        with pytest.raises(ImageBroken):
            verb()
    assert image.pread(4096, 60 * KiB) == b"q" * 4096
    with pytest.raises(ImageBroken):
        image.close()
    assert image.closed
