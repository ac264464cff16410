"""Many writes in one call, together, by io_uring or by threads: overwrites, and what allocates."""

import mmap
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.qemu import check_clean, compare_bytes
from support.stamps import noise, stamped

import qcow2x

KiB = 1 << 10
MiB = 1 << 20
SIZE = 8 * MiB + 512

AGAIN = """
import mmap, os, random, resource, sys
import qcow2x
from support.stamps import noise
path, cache, no_ring = sys.argv[1:]
held = []
with qcow2x.open(path, "r+", references="follow", cache=cache) as image:
    if no_ring == "1":
        # Every number up to the limit is taken: there is none for a ring.
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            while True:
                held.append(os.dup(0))
        except OSError:
            pass
    model = bytearray(image.pread(image.size, 0))
    rng = random.Random(1)
    for many in (1, 2, 40, 300):
        cuts = sorted(rng.sample(range(image.size), 2 * many))
        # Whole blocks, as a guest writes them, in aligned memory; and pieces of any length.
        for grain in (4096, 1):
            requests = []
            for low, high in zip(cuts[::2], cuts[1::2]):
                low, high = low // grain * grain, high // grain * grain
                high = min(high, low + 200_000)
                if low == high or (requests and low < requests[-1][1] + len(requests[-1][0])):
                    continue
                data = mmap.mmap(-1, high - low)
                data[:] = noise(low, high - low, many + grain)
                requests.append((data, low))
            rng.shuffle(requests)
            assert image.pwritev_many(requests) == [len(data) for data, _ in requests]
            for data, low in requests:
                model[low : low + len(data)] = data
    assert image.pread(image.size, 0) == model
    for fd in held:
        os.close(fd)
with open(path + ".model", "wb") as out:
    out.write(model)
"""


@pytest.mark.parametrize("no_ring", ["0", "1"], ids=["ring", "threads"])
@pytest.mark.parametrize("cache", ["writeback", "none", "directsync", "writethrough"])
def test_the_same_bytes_as_one_by_one(tmp_path: Path, cache: str, no_ring: str) -> None:
    """Over data, zeros, compressed clusters, nothing, and what a backing file shows."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qcow2x.create(base, SIZE)
    with qcow2x.open(base, "r+") as image:
        image.pwrite(noise(0, SIZE // 2, 1), 0)
    qcow2x.create(top, backing_file=base, backing_format="qcow2")
    rng = random.Random(0)
    with qcow2x.open(top, "r+", references="follow") as image:
        for n in range(80):
            off = rng.randrange(SIZE // (64 * KiB)) * 64 * KiB
            if n % 4 == 0:
                image.write_zeroes(off, 64 * KiB)
            elif n % 4 == 1:
                image.pwrite_compressed(bytes([n]) * 64 * KiB, off)
            else:
                image.pwrite(noise(off, 100 * KiB, n)[: SIZE - off], off)
        image.snapshots.create("before")
        frozen = image.pread(SIZE, 0)
    parent = Path(qcow2x.__file__).resolve().parent.parent
    path = os.pathsep.join((str(parent), str(Path(__file__).resolve().parent)))
    subprocess.run(
        [sys.executable, "-c", AGAIN, str(top), cache, no_ring],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    check_clean(top)
    compare_bytes(top, Path(f"{top}.model").read_bytes())
    with qcow2x.open(top, references="follow") as image, image.snapshots.open("before") as then:
        assert then.pread(SIZE, 0) == frozen


def test_nothing_is_written_if_one_is_outside(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        for bad in ((b"xx", MiB - 1), (b"x", -1), (b"x", 1 << 64)):
            with pytest.raises(ValueError):
                image.pwritev_many([(b"data", 0), bad])
        with pytest.raises(TypeError):
            image.pwritev_many([(b"data", 0), ("text", 10)])
        assert image.pread(MiB, 0) == bytes(MiB)
        assert image.pwritev_many([]) == []
        assert image.pwritev_many([(b"", 5), (b"", 6)]) == [0, 0]


def test_refused_where_writes_are(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path) as image, pytest.raises(PermissionError):
        image.pwritev_many([(b"x", 0), (b"y", 1)])
    with pytest.raises(ValueError, match="closed"):
        image.pwritev_many([(b"x", 0), (b"y", 1)])


def test_tracked_by_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(stamped(0, MiB, 1), 0)
        image.bitmaps.add("changed", granularity=64 * KiB)
        image.pwritev_many([(b"x" * 512, 100 * KiB), (b"y" * 512, 500 * KiB)])
        dirty = [(run.offset, run.length) for run in image.bitmaps.extents("changed") if run.dirty]
    assert dirty == [(64 * KiB, 64 * KiB), (448 * KiB, 64 * KiB)]


def test_unaligned_buffers_with_o_direct(tmp_path: Path) -> None:
    """What O_DIRECT would not take goes through an aligned buffer, next to what it takes."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    model = bytearray(stamped(0, MiB, 1))
    with qcow2x.open(path, "r+", cache="none") as image:
        image.pwrite(model, 0)
        page = mmap.mmap(-1, 8 * KiB)
        page[:] = noise(0, 8 * KiB, 3)
        requests = [
            (memoryview(page)[:4096], 0),
            (memoryview(page)[100:4196], 64 * KiB),
            (memoryview(page)[:4096], 128 * KiB + 100),
            (memoryview(page)[4096:8100], 256 * KiB),
        ]
        image.pwritev_many(requests)
        for data, off in requests:
            model[off : off + len(data)] = data
        assert image.pread(MiB, 0) == model
    compare_bytes(path, bytes(model))


def blocks(places: list[int], size: int, stamp: int) -> list[tuple[mmap.mmap, int]]:
    requests = []
    for place in places:
        data = mmap.mmap(-1, size)
        data[:] = stamped(place * size, size, stamp)
        requests.append((data, place * size))
    return requests


@pytest.mark.parametrize("growth", ["auto", "ahead", "plain"])
@pytest.mark.parametrize("cache", ["none", "directsync"])
@pytest.mark.parametrize("size", [4 * KiB, 16 * KiB, 64 * KiB, 256 * KiB])
def test_threads_that_allocate_many_at_a_time(
    tmp_path: Path, cache: str, growth: str, size: int
) -> None:
    """Each thread's writes lie between those of the others, often in the same cluster."""
    path = tmp_path / "image"
    qcow2x.create(path, 64 * MiB)
    places = list(range(64 * MiB // size))
    if size < 64 * KiB:
        places = places[:512]
    random.Random(size).shuffle(places)
    failures = []

    def work(number: int) -> None:
        try:
            own = blocks(places[number::4], size, number)
            for at in range(0, len(own), 40):
                image.pwritev_many(own[at : at + 40])
        except BaseException as exc:
            failures.append(exc)

    with qcow2x.open(path, "r+", cache=cache, growth=growth) as image:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
    check_clean(path)
    with qcow2x.open(path) as image:
        for number in range(4):
            for place in places[number::4]:
                off = place * size
                assert image.pread(size, off) == stamped(off, size, number)


@pytest.mark.parametrize("cache", ["none", "directsync", "writethrough"])
def test_writes_of_all_kinds_in_one_call(tmp_path: Path, cache: str) -> None:
    """In place, to nothing, off the alignment, from several threads: who has some under way waits for
    nobody else's."""
    path = tmp_path / "image"
    slot, slots = 8 * KiB, 2048
    model = bytearray(slot * slots)
    qcow2x.create(path, len(model))
    failures = []

    def work(number: int) -> None:
        try:
            rng = random.Random(number)
            for turn in range(4):
                mine = list(range(number, slots, 4))
                rng.shuffle(mine)
                requests = []
                for place in mine:
                    low, size = place * slot, slot
                    if rng.random() < 0.02:
                        low, size = low + rng.randrange(4000), rng.randrange(1, 4000)
                    elif rng.random() < 0.1:
                        continue
                    data = mmap.mmap(-1, size)
                    data[:] = noise(low, size, turn)
                    requests.append((data, low))
                image.pwritev_many(requests)
                for data, low in requests:
                    model[low : low + len(data)] = data
        except BaseException as exc:
            failures.append(exc)

    with qcow2x.open(path, "r+", cache=cache) as image:
        # Half of it is there from the beginning.
        for place in range(0, slots, 16):
            image.pwrite(bytes(8 * slot), place * slot)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert image.pread(len(model), 0) == model
    check_clean(path)
    compare_bytes(path, bytes(model))


NO_MORE_THAN = """
import mmap, resource, signal, sys
import qcow2x
from test_write_many import KiB, blocks
path, cache = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
with qcow2x.open(path, "r+", cache=cache) as image:
    image.pwritev_many(blocks(range(8), 64 * KiB, 1))
    image.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048 * KiB, hard))
    try:
        image.pwritev_many(blocks(range(4, 100), 64 * KiB, 2))
        sys.exit("more was written than the file may hold")
    except OSError as exc:
        assert "image" in str(exc), exc
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    image.pwritev_many(blocks(range(64, 100), 64 * KiB, 3))
    image.flush()
"""


@pytest.mark.parametrize("cache", ["none", "directsync"])
def test_a_host_that_takes_no_more(tmp_path: Path, cache: str) -> None:
    path = tmp_path / "image"
    qcow2x.create(path, 64 * MiB)
    done = subprocess.run(
        [sys.executable, "-c", NO_MORE_THAN, path, cache],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check_clean(path)
    with qcow2x.open(path) as image:
        for place in range(128):
            off = place * 64 * KiB
            data = image.pread(64 * KiB, off)
            may_be = [bytes(64 * KiB)] if place >= 8 else [stamped(off, 64 * KiB, 1)]
            if 4 <= place < 64:
                may_be.append(stamped(off, 64 * KiB, 2))
            if 64 <= place < 100:
                may_be = [stamped(off, 64 * KiB, 3)]
            assert data in may_be, place


@pytest.mark.parametrize("depth", [1, 5, 64])
@pytest.mark.parametrize("cache", ["none", "directsync"])
def test_a_bound_on_what_is_under_way(tmp_path: Path, cache: str, depth: int) -> None:
    """More than one batch of them, over what is there and over nothing."""
    path = tmp_path / "disk.qcow2"
    model = bytearray(SIZE)
    qcow2x.create(path, SIZE)
    rng = random.Random(depth)
    places = rng.sample(range(SIZE // 4096), 1200)
    with qcow2x.open(path, "r+", cache=cache) as image:
        for turn in range(2):
            requests = []
            for place in places:
                data = mmap.mmap(-1, 4096)
                data[:] = stamped(place * 4096, 4096, turn)
                requests.append((data, place * 4096))
                model[place * 4096 : place * 4096 + 4096] = data
            assert image.pwritev_many(requests, depth=depth) == [4096] * len(places)
        assert image.pread(SIZE, 0) == model
        with pytest.raises(ValueError, match="depth must be between 1 and 64"):
            image.pwritev_many([(bytes(512), 0)], depth=65)
    check_clean(path)
    compare_bytes(path, model)
