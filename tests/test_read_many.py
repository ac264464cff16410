"""Many reads in one call: by io_uring, by threads where the kernel gives no ring, and one by one for
what is not simply in the file."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.stamps import noise

import qcow2x

KiB = 1 << 10
MiB = 1 << 20
SIZE = 4 * MiB + 512

AGAIN = """
import mmap, os, random, resource, sys
import qcow2x
path, cache, no_ring = sys.argv[1:]
held = []
with qcow2x.open(path, references="follow", cache=cache) as image:
    if no_ring == "1":
        # Every number up to the limit is taken: there is none for a ring.
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            while True:
                held.append(os.dup(0))
        except OSError:
            pass
    rng = random.Random(1)
    for many in (1, 2, 64, 500):
        wanted = [(rng.randrange(1, 20000), rng.randrange(image.size)) for _ in range(many)]
        whole = [(4096 * rng.randrange(1, 9), 4096 * rng.randrange(image.size // 4096)) for _ in wanted]
        requests = [(bytearray(n), off) for n, off in wanted]
        requests += [(mmap.mmap(-1, n), off) for n, off in whole]
        got = image.preadv_many(requests)
        assert got == [min(len(b), image.size - off) for b, off in requests]
        for (buffer, off), n in zip(requests, got):
            assert bytes(buffer[:n]) == image.pread(n, off)
    for fd in held:
        os.close(fd)
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, zeros, compressed clusters, and what a backing file shows."""
    folder = tmp_path_factory.mktemp("many")
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    qcow2x.create(base, SIZE)
    with qcow2x.open(base, "r+") as image:
        image.pwrite(noise(0, SIZE, 1), 0)
    qcow2x.create(top, backing_file=base, backing_format="qcow2")
    rng = random.Random(0)
    with qcow2x.open(top, "r+", references="follow") as image:
        for n in range(40):
            off = rng.randrange(SIZE // (64 * KiB)) * 64 * KiB
            if n % 4 == 0:
                image.write_zeroes(off, 64 * KiB)
            elif n % 4 == 1:
                image.pwrite_compressed(bytes([n]) * 64 * KiB, off)
            else:
                data = noise(off, 100 * KiB, n)[: SIZE - off]
                image.pwrite(data, off)
    return top


@pytest.mark.parametrize("no_ring", ["0", "1"], ids=["ring", "threads"])
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_the_same_bytes_as_one_by_one(chain: Path, cache: str, no_ring: str) -> None:
    parent = str(Path(qcow2x.__file__).resolve().parent.parent)
    subprocess.run(
        [sys.executable, "-c", AGAIN, str(chain), cache, no_ring],
        check=True,
        env={**os.environ, "PYTHONPATH": parent},
    )


def test_a_file_cut_short_reads_as_one_by_one(tmp_path: Path) -> None:
    """A cluster that the file's end cuts reads as zeros from there on."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"x" * MiB, 0)
    os.truncate(path, os.path.getsize(path) - 100)
    with qcow2x.open(path) as image:
        requests = [(bytearray(64 * KiB), off) for off in range(0, MiB, 64 * KiB)]
        image.preadv_many(requests)
        assert b"".join(bytes(buffer) for buffer, _ in requests) == image.pread(MiB, 0)


@pytest.mark.parametrize("cached", ["all", "half", "nothing"])
def test_long_ones_that_are_cached_or_not(tmp_path: Path, cached: str) -> None:
    """Several CPUs copy what is in the page cache. The file ends inside the last one."""
    path = tmp_path / "disk.qcow2"
    size = 24 * MiB
    content = noise(0, size, 1)
    qcow2x.create(path, size)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(content, 0)
    nbytes = os.path.getsize(path) - 100
    os.truncate(path, nbytes)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        gone = {"all": 0, "half": nbytes // 2, "nothing": nbytes}[cached]
        if gone:
            os.posix_fadvise(file.fileno(), 0, gone, os.POSIX_FADV_DONTNEED)
    with qcow2x.open(path) as image:
        requests = [(bytearray(MiB), off) for off in range(0, size, MiB)]
        assert image.preadv_many(requests) == [MiB] * len(requests)
    assert b"".join(buffer for buffer, _ in requests) == content[:-100] + bytes(100)


@pytest.mark.not_for_qemu("an entry leads past the end of the file")
def test_the_first_failure_is_raised(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"x" * MiB, 0)
        where = next(image.extents(512 * KiB)).host_offset
        assert where is not None
        table = where // (64 * KiB)
    data = bytearray(path.read_bytes())
    # The entry of the ninth cluster leads past the end of the file.
    l2 = int.from_bytes(data[3 * 65536 : 3 * 65536 + 8], "big") & 0x00FFFFFFFFFFFE00
    data[l2 + 8 * 8 : l2 + 8 * 9] = (1 << 63 | table << 40).to_bytes(8, "big")
    path.write_bytes(data)
    with qcow2x.open(path) as image:
        requests = [(bytearray(4096), off) for off in range(0, MiB, 64 * KiB)]
        with pytest.raises(qcow2x.CorruptImage, match="past the end"):
            image.preadv_many(requests)
        assert image.preadv_many(requests[:8]) == [4096] * 8


def test_after_close_nothing_is_read(chain: Path) -> None:
    image = qcow2x.open(chain, references="follow")
    image.close()
    for requests in ([], [(bytearray(1), 0)]):
        with pytest.raises(ValueError):
            image.preadv_many(requests)


@pytest.mark.parametrize("depth", [1, 3, 64])
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_bound_on_what_is_under_way(chain: Path, cache: str, depth: int) -> None:
    """More than one batch of them; a device's queue is not seen from here, the bytes are."""
    rng = random.Random(depth)
    with qcow2x.open(chain, references="follow", cache=cache) as image:
        wanted = [(bytearray(4096), 4096 * rng.randrange(SIZE // 4096)) for _ in range(1500)]
        image.preadv_many(wanted, depth=depth)
        content = image.pread(SIZE, 0)
    assert all(buffer == content[off : off + 4096] for buffer, off in wanted)


class Below:
    """A backing file in Python, which itself has many reads under way when it is asked."""

    def __init__(self, image: qcow2x.Image) -> None:
        self.image = image
        self.asked = 0

    def size(self) -> int:
        return self.image.size

    def pread(self, length: int, offset: int) -> bytes:
        self.asked += 1
        half = bytearray(length // 2), bytearray(length - length // 2)
        self.image.preadv_many([(half[0], offset), (half[1], offset + len(half[0]))])
        return bytes(half[0] + half[1])


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_many_within_many(tmp_path: Path, cache: str) -> None:
    """A ring serves one call at a time."""
    base, same, top = tmp_path / "base.raw", tmp_path / "same.qcow2", tmp_path / "top.qcow2"
    base.write_bytes(noise(0, 4 * MiB, 1))
    qcow2x.convert(base, same, src_format="raw")
    qcow2x.create(top, backing_file=base, backing_format="raw")
    with qcow2x.open(same, cache=cache) as lower:
        below = Below(lower)
        with qcow2x.open(top, "r+", cache=cache, backing=below) as image:
            for off in range(0, 4 * MiB, 128 * KiB):
                image.pwrite(noise(off, 64 * KiB, 2), off)
            content = image.pread(4 * MiB, 0)
            below.asked = 0
            wanted = [(bytearray(8 * KiB), off) for off in range(0, 4 * MiB, 8 * KiB)]
            random.Random(0).shuffle(wanted)
            image.preadv_many(wanted)
            assert below.asked
    assert (
        content[: 128 * KiB] == noise(0, 64 * KiB, 2) + noise(0, 4 * MiB, 1)[64 * KiB : 128 * KiB]
    )
    assert all(buffer == content[off : off + 8 * KiB] for buffer, off in wanted)


@pytest.mark.parametrize("depth", [0, -1, 65, 1 << 70])
def test_a_depth_out_of_range(chain: Path, depth: int) -> None:
    with qcow2x.open(chain, references="follow") as image:
        buffer = bytearray(4096)
        with pytest.raises(ValueError, match="depth must be between 1 and 64"):
            image.preadv_many([(buffer, 0)], depth=depth)
    assert buffer == bytes(4096)
