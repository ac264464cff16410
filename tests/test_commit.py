"""commit(): layers into a base, against a model of bytes; beside qemu-img commit; cut short."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.qemu import qemu_check, qemu_img
from support.recorder import Recorder
from support.stamps import stamped

import qcow2x
from qcow2x.ops.commit import commit_layers

SIZE = 640 << 10

SHAPES: dict[str, dict[str, Any]] = {
    "64k": {},
    "512": {"cluster_size": 512},
    "2M": {"cluster_size": 2 << 20},
    "version 2": {"compat": "0.10", "cluster_size": 4096},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
    "1-bit refcounts": {"cluster_size": 1024, "refcount_bits": 1},
    "64-bit refcounts": {"cluster_size": 4096, "refcount_bits": 64},
    "zstd": {"compression_type": "zstd"},
}


class Disks:
    """A chain of images, b0 at the bottom, and what each layer's disk reads as."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.models: list[bytearray] = []

    def path(self, number: int = -1) -> Path:
        return self.folder / self.names[number]

    def add(self, size: int, format: str = "qcow2", **options: Any) -> None:
        name = f"b{len(self.names)}"
        if self.names:
            options |= {"backing_file": self.names[-1], "backing_format": self.format}
        if format == "raw":
            (self.folder / name).write_bytes(bytes(size))
        else:
            qcow2x.create(self.folder / name, size, **options)
        below = self.models[-1] if self.models else b""
        self.names.append(name)
        self.models.append(bytearray(bytes(below[:size]).ljust(size, b"\0")))
        self.format = format

    def fill(self, seed: int) -> None:
        """Data, compressed clusters, zeros and discards all over the topmost layer."""
        rng = random.Random(seed)
        model = self.models[-1]
        if self.format == "raw":
            data = stamped(0, len(model), seed)
            self.path().write_bytes(data)
            model[:] = data
            return
        with qcow2x.open(self.path(), "r+", references="follow") as image:
            cluster = image.cluster_size
            for what in ["write", "zero", "compressed", "unmap"] * 4:
                offset = rng.randrange(len(model))
                length = min(len(model) - offset, rng.choice([1, 512, 5000, 70_000]))
                if what == "write":
                    data = stamped(offset, length, seed)
                    image.pwrite(data, offset)
                    model[offset : offset + length] = data
                elif what == "compressed" and cluster < 1 << 20:
                    offset -= offset % cluster
                    data = stamped(offset, min(cluster, len(model) - offset), seed + 1)
                    image.discard(offset, len(data))
                    try:
                        image.pwrite_compressed(data, offset)
                    except ValueError:
                        # Something is there, and it stays: as good as any other write.
                        image.pwrite(data, offset)
                    model[offset : offset + len(data)] = data
                else:
                    image.write_zeroes(offset, length, unmap=what == "unmap")
                    model[offset : offset + length] = bytes(length)
            assert image.pread(len(model), 0) == model

    def read(self, number: int) -> bytes:
        with qcow2x.open(self.path(number), references="follow") as image:
            return image.pread(image.size, 0)


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


@pytest.mark.parametrize("base_shape", ["64k", "512", "subclusters", "version 2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_base_reads_as_the_image_did(disks: Disks, shape: str, base_shape: str) -> None:
    disks.add(SIZE, **SHAPES[base_shape])
    disks.fill(1)
    disks.add(SIZE, **SHAPES[shape])
    disks.fill(2)
    result = qcow2x.commit(disks.path(), references="follow")
    assert result.emptied
    assert result.grown_by == 0
    assert disks.read(0) == disks.read(1) == disks.models[1]
    for number in (0, 1):
        qemu_check(disks.path(number))
    with qcow2x.open(disks.path(), references="follow") as image:
        assert all(run.depth == 1 for run in image.extents(layers=1))
        # The header, and a cluster each of refcount table, refcounts and L1 table.
        assert disks.path().stat().st_size == 4 * image.cluster_size
    assert qcow2x.check(disks.path()).clean


@pytest.mark.parametrize("sizes", [(SIZE, SIZE + 66_048), (SIZE + 66_048, SIZE), (512, SIZE)])
@pytest.mark.parametrize("base", ["raw", "qcow2"])
def test_sizes_that_differ(disks: Disks, sizes: tuple[int, int], base: str) -> None:
    disks.add(sizes[0], base)
    disks.fill(3)
    kept = bytes(disks.models[0])
    disks.add(sizes[1], cluster_size=4096)
    disks.fill(4)
    result = qcow2x.commit(disks.path(), references="follow")
    assert result.grown_by == max(0, sizes[1] - sizes[0])
    assert disks.read(1) == disks.models[1]
    want = bytes(disks.models[1]) + kept[sizes[1] :]
    got = disks.path(0).read_bytes() if base == "raw" else disks.read(0)
    assert got == want


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("middle", [SIZE, SIZE // 2 + 512])
def test_through_several_layers(disks: Disks, depth: int, middle: int) -> None:
    disks.add(SIZE + 4096)
    disks.fill(5)
    disks.add(middle, cluster_size=4096)
    disks.fill(6)
    disks.add(middle + 1024, **SHAPES["subclusters"])
    disks.fill(7)
    disks.add(SIZE, cluster_size=512)
    disks.fill(8)
    files = [disks.path(n).read_bytes() for n in range(4)]
    result = qcow2x.commit(disks.path(), disks.names[3 - depth], references="follow")
    assert not result.emptied
    assert disks.read(3 - depth)[:SIZE] == disks.models[3]
    assert disks.read(3) == disks.models[3]
    for number in range(4):
        qemu_check(disks.path(number))
        if number != 3 - depth:
            assert disks.path(number).read_bytes() == files[number]


def test_a_longer_file_below_the_base_does_not_show_through_what_the_base_grew_by(
    disks: Disks,
) -> None:
    disks.add(SIZE)
    disks.fill(9)
    disks.add(4096)
    disks.add(SIZE)
    qcow2x.commit(disks.path(), references="follow")
    assert disks.read(1) == disks.read(2) == disks.models[2]


def test_names_of_the_base(disks: Disks, tmp_path: Path) -> None:
    for _ in range(3):
        disks.add(SIZE)
    top = disks.path()
    for base in (1, 2, "b0", tmp_path / "b1", str(tmp_path / "." / "b0")):
        assert not qcow2x.commit(top, base, references="follow").emptied
    with pytest.raises(ValueError, match="Did not find 'b2' in the backing chain of"):
        qcow2x.commit(top, "b2", references="follow")
    with pytest.raises(ValueError, match="Did not find '3' in"):
        qcow2x.commit(top, 3, references="follow")
    with pytest.raises(ValueError, match="does not have a backing file"):
        qcow2x.commit(tmp_path / "b0", references="follow")


def test_nothing_is_opened_without_leave(disks: Disks) -> None:
    disks.add(SIZE)
    disks.add(SIZE)
    before = disks.path(0).read_bytes()
    with pytest.raises(qcow2x.ReferenceDenied):
        qcow2x.commit(disks.path())
    assert disks.path(0).read_bytes() == before


def test_drop_leaves_the_image_as_it_was(disks: Disks) -> None:
    disks.add(SIZE)
    disks.add(SIZE)
    disks.fill(10)
    before = disks.path().read_bytes()
    disks.path().chmod(0o444)
    assert not qcow2x.commit(disks.path(), drop=True, references="follow").emptied
    assert disks.path().read_bytes() == before
    assert disks.read(0) == disks.models[1]


def test_base_in_use(disks: Disks) -> None:
    disks.add(SIZE)
    disks.add(SIZE)
    disks.fill(11)
    with qcow2x.open(disks.path(0), "r+"), pytest.raises(qcow2x.ImageLocked):
        qcow2x.commit(disks.path(), references="follow")
    qcow2x.commit(disks.path(), references="follow")


@pytest.mark.parametrize("with_data_file", [False, True])
def test_bitmaps_and_snapshots_stay_right(
    disks: Disks, tmp_path: Path, with_data_file: bool
) -> None:
    disks.add(SIZE)
    with qcow2x.open(disks.path(), "r+") as base:
        base.bitmaps.add("changed", 65536)
    disks.add(SIZE, **({"data_file": str(tmp_path / "data")} if with_data_file else {}))
    with qcow2x.open(disks.path(), "r+", references="follow") as image:
        image.pwrite(b"then" * 5000, 3 << 16)
        disks.models[-1][3 << 16 : (3 << 16) + 20_000] = b"then" * 5000
        then = bytes(disks.models[-1])
        if not with_data_file:
            image.snapshots.create("then")
        image.bitmaps.add("mine", 65536)
        image.pwrite(b"x" * 65536, 65536)
        disks.models[-1][65536:131072] = b"x" * 65536
    assert qcow2x.commit(disks.path(), references="follow").emptied
    assert disks.read(0) == disks.read(1) == disks.models[1]
    with qcow2x.open(disks.path(0)) as base:
        assert base.bitmaps["changed"].count == 2 * 65536
    with qcow2x.open(disks.path(), references="follow") as image:
        assert image.bitmaps["mine"].count == 65536
        if not with_data_file:
            with image.snapshots.open("then") as snapshot:
                assert snapshot.pread(SIZE, 0)[3 << 16 : 4 << 16] == then[3 << 16 : 4 << 16]
    assert qcow2x.check(disks.path()).clean


def test_encrypted_layers(disks: Disks) -> None:
    luks = qcow2x.Encryption(key="hush", iter_time_ms=10)
    disks.add(SIZE)
    disks.add(SIZE, encryption=luks)
    with qcow2x.open(disks.path(), "r+", references="follow", key="hush") as image:
        image.pwrite(b"secret" * 1000, 100)
    result = qcow2x.commit(disks.path(), references="follow", key="hush")
    assert result.emptied
    assert disks.read(0)[100:6100] == b"secret" * 1000
    assert qcow2x.check(disks.path()).clean


def test_cancel_keeps_the_image(disks: Disks) -> None:
    disks.add(SIZE)
    disks.add(SIZE)
    disks.fill(12)
    with pytest.raises(qcow2x.Cancelled):
        qcow2x.commit(disks.path(), references="follow", progress=lambda *_: False)
    assert disks.read(1) == disks.models[1]
    seen: list[tuple[int, int, str]] = []
    qcow2x.commit(
        disks.path(),
        references="follow",
        progress=lambda *now: seen.append(now),
        rate_limit=1 << 30,
    )
    total = seen[0][1]
    assert seen[0] == (0, total, "commit")
    assert seen[-1] == (total, total, "commit")


@pytest.mark.parametrize("depth", [1, 2])
def test_beside_qemu_img(disks: Disks, tmp_path: Path, depth: int) -> None:
    disks.add(SIZE)
    disks.fill(13)
    disks.add(SIZE)
    disks.fill(14)
    disks.add(SIZE, cluster_size=4096)
    disks.fill(15)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in disks.names:
        (theirs / name).write_bytes((tmp_path / name).read_bytes())
    base = f"b{2 - depth}"
    qemu_img("commit", "-b", base, theirs / "b2")
    qcow2x.commit(disks.path(), base, references="follow")
    for number in (2 - depth, 2):
        assert qemu_img("compare", tmp_path / f"b{number}", theirs / f"b{number}")
        assert qcow2x.check(tmp_path / f"b{number}").clean


# ---- Cut short -----------------------------------------------------------------------------------

CRASH_SHAPES = {
    "in the order of QEMU": {"cluster_size": 4096},
    "512": {"cluster_size": 512},
    "64-bit refcounts": {"cluster_size": 4096, "refcount_bits": 64},
    "version 2": {"cluster_size": 4096, "compat": "0.10"},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
    "with a snapshot": {"cluster_size": 4096},
}
CRASH_SIZE = 96 << 10


@pytest.mark.parametrize("shape", CRASH_SHAPES)
def test_the_image_reads_the_same_after_a_cut_of_power(tmp_path: Path, shape: str) -> None:
    """Both files share one log, so that a cut of power hits them at one instant."""
    disks = Disks(tmp_path)
    disks.add(CRASH_SIZE // 2, cluster_size=4096)
    disks.fill(16)
    disks.add(CRASH_SIZE, **CRASH_SHAPES[shape])
    disks.fill(17)
    if shape == "with a snapshot":
        with qcow2x.open(disks.path(), "r+", references="follow") as image:
            image.snapshots.create("then")
            image.pwrite(b"n" * 5000, 1000)
            disks.models[-1][1000:6000] = b"n" * 5000
    log: list[tuple[int, tuple]] = []
    files = [Recorder(disks.path(n).read_bytes()) for n in (0, 1)]
    base = qcow2x.open(files[0], "r+", lock=False)
    top = qcow2x.open(files[1], "r+", lock=False, backing=qcow2x.backing.GuestDisk(base))
    for number, file in enumerate(files):
        file.log = _Shared(log, number)  # type: ignore[assignment]
    commit_layers(top, base, 1, empty=True, threads=1)
    top.close()
    base.close()
    want = bytes(disks.models[1])
    rng = random.Random(shape)
    states = 0
    for upto in range(len(log) + 1):
        for _ in range(2):
            left = [_left_of(files[n].start, log[:upto], n, rng) for n in (0, 1)]
            _check_after_crash(left, want)
            states += 1
    assert states > 20


def _check_after_crash(left: list[bytes], want: bytes) -> None:
    with (
        qcow2x.open(Recorder(left[0]), lock=False) as base,
        qcow2x.open(Recorder(left[1]), lock=False, backing=qcow2x.backing.GuestDisk(base)) as image,
    ):
        assert image.pread(image.size, 0) == want
    again = [Recorder(data) for data in left]
    with (
        qcow2x.open(again[0], "r+", lock=False) as base,
        qcow2x.open(again[1], "r+", lock=False, backing=qcow2x.backing.GuestDisk(base)) as image,
    ):
        commit_layers(image, base, 1, empty=True, threads=1)
        assert image.pread(image.size, 0) == want
        assert base.pread(len(want), 0) == want
    for file in again:
        found = qcow2x.check(file)
        assert not found.corruptions
        assert not found.check_errors


class _Shared(list):
    """Notes what one of several files was asked to do in a log of all."""

    def __init__(self, log: list[tuple[int, tuple]], number: int) -> None:
        super().__init__()
        self._log, self._number = log, number

    def append(self, entry: tuple) -> None:
        super().append(entry)
        self._log.append((self._number, entry))


def _left_of(start: bytes, log: list[tuple[int, tuple]], number: int, rng: random.Random) -> bytes:
    """A file as a cut of power after ``log`` may leave it."""
    mine = Recorder(start)
    mine.log = [entry for owner, entry in log if owner == number]
    if not mine.log:
        return start
    last = [data for at, data in mine.crashes(rng, 1) if at == len(mine.log)]
    # After a flush there is just one way.
    return last[0] if last else _all_of(start, mine.log)


def _all_of(start: bytes, log: list[tuple]) -> bytes:
    from support.recorder import apply

    data = bytearray(start)
    for entry in log:
        if entry[0] != "flush":
            apply(data, entry)
    return bytes(data)
