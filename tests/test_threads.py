"""Many threads on one image: nothing is lost, nothing foreign appears, nothing hangs.

Each thread owns regions whose bytes it alone knows, so every read of them is exact; in the shared
region every sector must be a whole sector that some thread wrote there. A round that does not end
dumps every thread's stack and fails.
"""

import faulthandler
import random
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.qemu import check_clean, compare_bytes, qemu_img
from support.stamps import explain, stamped

import qcow2x

KiB = 1 << 10
MiB = 1 << 20
HANG = 120


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A deadlock below the GIL cannot be interrupted: show the stacks and end the run."""
    faulthandler.dump_traceback_later(HANG, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=[False, True], ids=["", "eager-switch"])
def switching(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once with the interpreter handing over its lock as often as it can."""
    interval = sys.getswitchinterval()
    if request.param:
        sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run_together(jobs: list[Callable[[], None]]) -> None:
    """Starts all jobs at once; the first failure is raised after all have ended."""
    failures: list[BaseException] = []
    gate = threading.Barrier(len(jobs))

    def guarded(job: Callable[[], None]) -> None:
        try:
            gate.wait(30)
            job()
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Guest:
    """One thread's part of the disk: stripes of it, interleaved with those of all others so that
    neighbours share clusters, L2 slices and packed compressed clusters."""

    def __init__(self, image: qcow2x.Image, number: int, count: int, stripe: int) -> None:
        self.image = image
        self.random = random.Random(number * 1000 + count)
        self.stripe = stripe
        self.starts = range(number * stripe, image.size - stripe + 1, count * stripe)
        self.model = {start: bytearray(stripe) for start in self.starts}
        self.sequence = number << 32

    def work(self, rounds: int, actions: list[str]) -> None:
        for _ in range(rounds):
            start = self.random.choice(self.starts)
            getattr(self, self.random.choice(actions))(start)
        for start in self.starts:
            self.read(start)

    def write(self, start: int) -> None:
        at = self.random.randrange(self.stripe)
        length = self.random.randint(1, self.stripe - at)
        self.sequence += 1
        data = stamped(start + at, length, self.sequence)
        self.image.pwrite(data, start + at)
        self.model[start][at : at + length] = data

    def zero(self, start: int) -> None:
        at = self.random.randrange(self.stripe)
        length = self.random.randint(1, self.stripe - at)
        self.image.write_zeroes(start + at, length, unmap=self.random.random() < 0.5)
        self.model[start][at : at + length] = bytes(length)

    def read(self, start: int) -> None:
        got = self.image.pread(self.stripe, start)
        wanted = self.model[start]
        assert got == wanted, explain(start, got, wanted)

    def flush(self, start: int) -> None:
        self.image.flush()

    # These two need stripes of whole clusters.

    def compress(self, start: int) -> None:
        self.sequence += 1
        data = stamped(start, self.stripe, self.sequence)
        self.image.pwrite_compressed(data, start)
        self.model[start][:] = data

    def discard(self, start: int) -> None:
        self.image.discard(start, self.stripe)
        self.model[start][:] = bytes(self.stripe)


SMALL = ["write", "write", "write", "read", "read", "zero", "flush"]
WHOLE = ["write", "write", "compress", "read", "discard", "zero", "flush"]


@pytest.mark.parametrize("cache", ["writeback", "writethrough", "none"])
@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize(
    "cluster_size, extended_l2", [(512, False), (4096, False), (65536, False), (65536, True)]
)
def test_threads_see_their_own_bytes(
    tmp_path: Path, cache: str, count: int, cluster_size: int, extended_l2: bool, switching: None
) -> None:
    """Stripes of whole clusters and, on another image, stripes smaller than a cluster."""
    rounds = {"writeback": 600, "writethrough": 160, "none": 240}[cache] // count
    for name, stripe, actions in (
        ("whole", cluster_size, WHOLE),
        ("parts", cluster_size // 4, SMALL),
    ):
        path = tmp_path / f"{name}.qcow2"
        size = max(256 * KiB, 48 * cluster_size if stripe == cluster_size else 16 * cluster_size)
        qcow2x.create(path, size, cluster_size=cluster_size, extended_l2=extended_l2)
        model = bytearray(size)
        with qcow2x.open(path, "r+", cache=cache, l2_cache_size=1) as image:
            guests = [Guest(image, number, count, stripe) for number in range(count)]
            run_together([lambda g=g, a=actions: g.work(rounds, a) for g in guests])
            for guest in guests:
                for start, data in guest.model.items():
                    model[start : start + stripe] = data
            got = image.pread(size, 0)
            assert got == model, explain(0, got, model)
        check_clean(path)
        compare_bytes(path, model)


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
@pytest.mark.parametrize("count", [4, 16])
def test_eviction_under_way(tmp_path: Path, cache: str, count: int) -> None:
    """Far more slices than the smallest cache holds, so every access loads one and drops one."""
    path = tmp_path / "disk.qcow2"
    size = 24 * MiB
    qcow2x.create(path, size, cluster_size=512, refcount_bits=64)
    rounds = (1600 if cache == "writeback" else 320) // count
    with qcow2x.open(path, "r+", cache=cache, l2_cache_size=1) as image:
        # 24 MiB of 512-byte clusters are 768 tables of one slice each.
        model: dict[int, bytes] = {}

        def job(number: int) -> None:
            rng = random.Random(number)
            for turn in range(rounds):
                place = rng.randrange(size // 512 // count) * count + number
                data = stamped(place * 512, 512, number << 32 | turn)
                image.pwrite(data, place * 512)
                model[place] = data
                old = rng.choice(list(model))
                if old % count == number:
                    assert image.pread(512, old * 512) == model[old]
                if turn % 50 == 49:
                    image.flush()

        run_together([lambda n=n: job(n) for n in range(count)])
        stats = image.stats()
        assert stats.l2_evictions > 0
        assert stats.l2_cache_bytes <= stats.l2_cache_limit
    check_clean(path)
    expected = bytearray(size)
    for place, data in model.items():
        expected[place * 512 : (place + 1) * 512] = data
    compare_bytes(path, expected)


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
@pytest.mark.parametrize("count", [4, 16])
@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
def test_overlapping_writers_leave_whole_sectors(
    tmp_path: Path, cache: str, count: int, backing: bool, switching: None
) -> None:
    """All threads write, compress, discard and zero the same few clusters. A sector afterwards is
    one that somebody put there, zeros, or the backing file's.

    A read while others write may see a sector half old and half new, as it may on a plain file (the
    page cache of ext4 is copied from while it is copied to), but never bytes of another place.
    """
    cluster = 4096
    size = 24 * cluster
    path = tmp_path / "disk.qcow2"
    options = {}
    if backing:
        (tmp_path / "base.raw").write_bytes(stamped(0, size, 7 << 40))
        options = {"backing_file": "base.raw", "backing_format": "raw"}
    qcow2x.create(path, size, cluster_size=cluster, **options)
    rounds = (1200 if cache == "writeback" else 240) // count

    def check(offset: int, data: bytes) -> None:
        for at in range(0, len(data), 512):
            sector = data[at : at + 512]
            if not any(sector):
                continue
            place, sequence = struct.unpack_from(">QQ", sector)
            assert place == offset + at, f"foreign data at {offset + at:#x}: from {place:#x}"
            assert sector == stamped(place, 512, sequence), f"torn sector at {offset + at:#x}"
            assert sequence >> 40 == 7 or sequence >> 32 <= count

    def check_place(offset: int, data: bytes) -> None:
        for at in range(0, len(data), 16):
            place = struct.pack(">Q", (offset + at) // 512 * 512)
            for got, wanted in zip(data[at : at + 8], place, strict=True):
                assert got in (wanted, 0), f"foreign data at {offset + at:#x}"

    with qcow2x.open(path, "r+", references="follow", cache=cache, l2_cache_size=1) as image:

        def job(number: int) -> None:
            rng = random.Random(number)
            for turn in range(rounds):
                first = rng.randrange(size // 512)
                length = rng.randint(1, min(24, size // 512 - first)) * 512
                whole = rng.randrange(size // cluster) * cluster
                action = rng.randrange(8)
                sequence = number << 32 | turn
                if action < 3:
                    image.pwrite(stamped(first * 512, length, sequence), first * 512)
                elif action == 3:
                    image.pwrite_compressed(stamped(whole, cluster, sequence), whole)
                elif action == 4:
                    image.discard(whole, cluster)
                elif action == 5:
                    image.write_zeroes(first * 512, length, unmap=bool(turn & 1))
                elif action == 6 and turn % 4 == 0:
                    image.flush()
                else:
                    check_place(first * 512, image.pread(length, first * 512))

        run_together([lambda n=n: job(n) for n in range(count)])
        final = image.pread(size, 0)
        check(0, final)
    check_clean(path)
    compare_bytes(path, final)


def test_writers_of_one_compressed_cluster_do_not_lose_each_other(tmp_path: Path) -> None:
    """Each thread replaces its own sector of clusters that start compressed: one of them makes the
    copy, the others must land in it."""
    cluster = 8192
    count = 16
    path = tmp_path / "disk.qcow2"
    clusters = 40
    qcow2x.create(path, clusters * cluster, cluster_size=cluster)
    base = stamped(0, clusters * cluster, 1)
    with qcow2x.open(path, "r+", l2_cache_size=1) as image:
        image.pwrite_compressed(base, 0)

        def job(number: int) -> None:
            for n in range(clusters):
                at = n * cluster + number * 512
                image.pwrite(stamped(at, 512, 100 + number), at)

        run_together([lambda n=n: job(n) for n in range(count)])
    expected = b"".join(
        stamped(at, 512, 100 + at // 512 % count) for at in range(0, clusters * cluster, 512)
    )
    check_clean(path)
    compare_bytes(path, expected)


def test_writers_above_one_backing_cluster(tmp_path: Path) -> None:
    """The same where the old bytes come from a backing file, in parts that share sectors."""
    cluster = 65536
    count = 16
    size = 8 * cluster
    base = tmp_path / "base.qcow2"
    qemu_img("create", "-f", "qcow2", base, size)
    path = tmp_path / "top.qcow2"
    qcow2x.create(
        path, size, cluster_size=cluster, backing_file="base.qcow2", backing_format="qcow2"
    )
    with qcow2x.open(base, "r+") as image:
        image.pwrite(stamped(0, size, 1), 0)
    part = cluster // count
    for cache in ("none", "writeback"):
        expected = bytearray(stamped(0, size, 1))
        with qcow2x.open(path, "r+", references="follow", cache=cache) as image:
            image.discard(0, size)

        def job(number: int, image: qcow2x.Image) -> None:
            for n in range(8):
                at = n * cluster + number * part + 100
                image.pwrite(bytes([number + 1]) * (part - 7), at)

        with qcow2x.open(path, "r+", references="follow", cache=cache) as image:
            image.pwrite(expected, 0)
            jobs = [lambda n=n, i=image: job(n, i) for n in range(count - 1)]
            run_together(jobs)
        for number in range(count - 1):
            for n in range(8):
                at = n * cluster + number * part + 100
                expected[at : at + part - 7] = bytes([number + 1]) * (part - 7)
        check_clean(path)
        compare_bytes(path, expected)


@pytest.mark.parametrize("cache", ["writeback", "writethrough", "none"])
@pytest.mark.parametrize("turn", range(4))
def test_close_during_requests(tmp_path: Path, cache: str, turn: int) -> None:
    """Whatever was acknowledged before close is in the file; what came too late raised."""
    path = tmp_path / "disk.qcow2"
    count = 8
    qcow2x.create(path, 16 * MiB, cluster_size=4096)
    image = qcow2x.open(path, "r+", cache=cache, l2_cache_size=1)
    done: list[tuple[int, int]] = []

    def job(number: int) -> None:
        rng = random.Random(number)
        for n in range(1, 100_000):
            at = (rng.randrange(4096 // count) * count + number) * 4096
            action = rng.randrange(8)
            try:
                if action < 5:
                    image.pwrite(stamped(at, 4096, number << 32 | n), at)
                    done.append((at, number << 32 | n))
                elif action == 5:
                    image.pread(65536, rng.randrange(15 * MiB))
                elif action == 6:
                    image.flush()
                else:
                    list(image.extents(0, MiB))
            except ValueError as exc:
                assert "closed" in str(exc), exc
                return
        raise AssertionError("was never closed")

    def close() -> None:
        time.sleep(0.05 * (turn + 1))
        image.close()

    run_together([*[lambda n=n: job(n) for n in range(count)], close, close])
    assert image.closed
    check_clean(path)
    last = dict(done)
    with qcow2x.open(path) as image:
        for at, sequence in last.items():
            got = image.pread(4096, at)
            wanted = stamped(at, 4096, sequence)
            assert got == wanted, explain(at, got, wanted)


def test_growing_the_disk_under_writers(tmp_path: Path) -> None:
    """Resizing moves the L1 table while others look at it."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 64 * KiB, cluster_size=512)
    steps = 60
    with qcow2x.open(path, "r+", l2_cache_size=1) as image:
        over = threading.Event()

        def grow() -> None:
            try:
                for n in range(2, steps):
                    image.resize(n * 64 * KiB)
            finally:
                over.set()

        def write(number: int) -> None:
            rng = random.Random(number)
            n = 0
            while not over.is_set() or n < 200:
                n += 1
                at = (rng.randrange(image.size // 512 // 4) * 4 + number) * 512
                data = stamped(at, 512, number << 32 | n)
                image.pwrite(data, at)
                assert image.pread(512, at) == data

        run_together([grow, *[lambda n=n: write(n) for n in range(4)]])
        final = image.pread(image.size, 0)
        assert len(final) == (steps - 1) * 64 * KiB
        for at in range(0, len(final), 512):
            sector = final[at : at + 512]
            assert not any(sector) or struct.unpack_from(">Q", sector)[0] == at
    check_clean(path)
    compare_bytes(path, final)


def test_readers_of_a_shared_backing_image(tmp_path: Path) -> None:
    """Two overlays opened over the same Image object, used at once."""
    base_path = tmp_path / "base.qcow2"
    size = 4 * MiB
    data = stamped(0, size, 3)
    qcow2x.create(base_path, size, cluster_size=4096, compression_type="zstd")
    with qcow2x.open(base_path, "r+") as image:
        image.pwrite_compressed(data, 0)
    with qcow2x.open(base_path, l2_cache_size=1) as base:
        tops = []
        for n in range(2):
            path = tmp_path / f"top{n}.qcow2"
            qcow2x.create(path, size, backing_file="base.qcow2", backing_format="qcow2")
            tops.append(qcow2x.open(path, "r+", backing=base))

        def job(number: int) -> None:
            rng = random.Random(number)
            top = tops[number % 2]
            for _ in range(60):
                at = rng.randrange(size - 70000)
                got = top.pread(70000, at)
                assert got == data[at : at + 70000], explain(at, got, data[at : at + 70000])
                if number < 2:
                    at = at // 512 * 512
                    top.pwrite(data[at : at + 5000], at)

        run_together([lambda n=n: job(n) for n in range(8)])
        for top in tops:
            top.close()
        assert base.pread(100, 0) == data[:100]
    for n in range(2):
        check_clean(tmp_path / f"top{n}.qcow2")
        compare_bytes(tmp_path / f"top{n}.qcow2", data)
