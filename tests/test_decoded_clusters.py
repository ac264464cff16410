"""Parts of compressed clusters: each is decoded once for requests that follow one another, and what is
read is what was written last, whoever was given the host clusters meanwhile."""

import random
import struct
import threading
from pathlib import Path

import pytest
from support.qemu import check_clean
from support.recorder import Recorder

import qcow2x

KiB = 1 << 10
CLUSTER = 64 * KiB


class Counting(Recorder):
    """Counts reads of streams: that of the last one asks once more for the end of its sector, past the
    end of the file."""

    reads = 0

    def pread(self, length: int, offset: int) -> bytes:
        self.reads += length > 4 * KiB
        return super().pread(length, offset)


def half_noise(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes // 2) + bytes(nbytes - nbytes // 2)


def image_of(path: Path, clusters: int, compression_type: str) -> bytes:
    disk = b"".join(half_noise(n, CLUSTER) for n in range(clusters))
    qcow2x.create(path, len(disk), compression_type=compression_type)
    with qcow2x.open(path, "r+") as image:
        image.pwrite_compressed(disk, 0)
    return disk


def first_stream(file: bytes) -> int:
    """Where the stream of the first cluster begins (section "Compressed Clusters Descriptor")."""
    (l1,) = struct.unpack_from(">Q", file, 40)
    (l2,) = struct.unpack_from(">Q", file, l1)
    (entry,) = struct.unpack_from(">Q", file, l2 & ((1 << 56) - 512))
    return entry & ((1 << 62 - (16 - 8)) - 1)


@pytest.mark.parametrize("compression_type", ["zlib", "zstd"])
def test_reads_of_a_page_after_another_fetch_each_cluster_once(
    tmp_path: Path, compression_type: str
) -> None:
    path = tmp_path / "disk.qcow2"
    disk = image_of(path, 8, compression_type)
    storage = Counting(path.read_bytes())
    with qcow2x.open(storage) as image:
        image.pread(1, 0)
        before = storage.reads
        assert image.pread(CLUSTER, CLUSTER) == disk[CLUSTER : 2 * CLUSTER]
        assert storage.reads == before + 1, "a whole cluster"
        got = [image.pread(4 * KiB, at) for at in range(0, len(disk), 4 * KiB)]
        assert b"".join(got) == disk
        # The first of the eight was there already; of the others some come along with what is before them.
        assert storage.reads <= before + 8
        before = storage.reads
        # Forwards and backwards in two places by turns, as who copies.
        for at in range(0, CLUSTER, 512):
            assert image.pread(512, 6 * CLUSTER + at) == disk[6 * CLUSTER + at :][:512]
            assert image.pread(512, 4 * CLUSTER - 512 - at) == disk[4 * CLUSTER - 512 - at :][:512]
        assert storage.reads == before


def test_what_failed_to_decode_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    disk = image_of(path, 2, "zlib")
    storage = Recorder(path.read_bytes())
    with qcow2x.open(storage) as image:
        good = bytes(storage.data)
        start = first_stream(good)
        storage.data[start : start + 64] = b"\xff" * 64
        with pytest.raises(qcow2x.CorruptImage):
            image.pread(4 * KiB, 0)
        storage.data[:] = good
        assert image.pread(4 * KiB, 4 * KiB) == disk[4 * KiB : 8 * KiB]


@pytest.mark.parametrize("refcount_bits", [1, 16])
def test_a_host_cluster_with_a_new_owner_is_read_anew(tmp_path: Path, refcount_bits: int) -> None:
    """With small clusters that are freed and packed again and again, streams of the same length
    soon lie where others lay."""
    size, count = 4 * KiB, 24
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, size * count, cluster_size=size, refcount_bits=refcount_bits)
    rng = random.Random(1)
    model = bytearray(size * count)
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        for turn in range(4000):
            at = rng.randrange(count) * size
            kind = rng.randrange(8)
            if kind < 3:
                # Few contents: the same lengths come again.
                data = half_noise(rng.randrange(40), size)
                image.discard(at, size)
                image.flush()
                image.pwrite_compressed(data, at)
                model[at : at + size] = data
            elif kind == 3:
                data = bytes([turn & 255]) * 700
                image.pwrite(data, at + 100)
                model[at + 100 : at + 800] = data
            elif kind == 4:
                image.flush()
            part = rng.randrange(count) * size + rng.randrange(7) * 512
            assert image.pread(512, part) == model[part : part + 512], (turn, part)
    check_clean(path)


def test_readers_while_clusters_change_owners(tmp_path: Path) -> None:
    """Each cluster holds one of a few patterns, all of it the same; a reader may meet the one before
    or the one after, but never a mixture or what is of another place."""
    size, count = 4 * KiB, 16
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, size * count, cluster_size=size)
    patterns = [
        [bytes([n, k]) * 64 + random.Random(n * 7 + k).randbytes(384) for k in range(4)]
        for n in range(count)
    ]
    wrong: list[object] = []
    ended = threading.Event()

    def read(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not ended.is_set():
                n = rng.randrange(count)
                got = image.pread(512, n * size + 512 * rng.randrange(8))
                if got not in patterns[n]:
                    wrong.append((n, got[:8]))
                    return
        except Exception as exc:
            wrong.append(exc)

    with qcow2x.open(path, "r+", cache="unsafe") as image:
        for n in range(count):
            image.pwrite_compressed(patterns[n][0] * 8, n * size)
        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for reader in readers:
            reader.start()
        rng = random.Random(9)
        for _ in range(1500):
            n = rng.randrange(count)
            image.pwrite_compressed(patterns[n][rng.randrange(4)] * 8, n * size)
            if rng.random() < 0.4:
                image.flush()
        ended.set()
        for reader in readers:
            reader.join()
    assert not wrong
