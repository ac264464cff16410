"""Who reads compressed clusters on and on has some of them decoded before he asks for them; who does not,
has none. Streams that lie together are fetched together where each transfer is a wait."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.packed import stream_of
from support.qemu import check_clean
from support.recorder import Recorder

import qcow2x

KIB, MIB = 1 << 10, 1 << 20


def content_of(clusters: int, size: int, seed: int = 0) -> bytes:
    """Six bits to a byte in one half of each cluster, zeros in the other."""
    rng = random.Random(seed)
    half = bytes(size // 2)
    return b"".join(
        bytes(byte & 0x3F for byte in rng.randbytes(size // 2)) + half for _ in range(clusters)
    )


def packed(path: Path, clusters: int, size: int = 64 * KIB, kind: str = "zlib") -> bytes:
    content = content_of(clusters, size)
    qcow2x.create(path, len(content), cluster_size=size, compression_type=kind)
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        image.pwrite_compressed(content, 0)
    return content


class Counting(Recorder):
    """Keeps the lengths of what is fetched of streams."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.read_bytes())
        self.first, _ = stream_of(path, 0)
        self.fetches: list[int] = []

    def pread(self, length: int, offset: int) -> bytes:
        # Less is what a stream lacks of its last sector, at the end of the file.
        if offset >= self.first and length >= 512:
            self.fetches.append(length)
        return super().pread(length, offset)


def by_path(path: Path) -> qcow2x.Image:
    return qcow2x.open(path)


def past_the_page_cache(path: Path) -> qcow2x.Image:
    return qcow2x.open(path, cache="none")


def by_python(path: Path) -> qcow2x.Image:
    return qcow2x.open(Recorder(path.read_bytes()))


Opens = Callable[[Path], qcow2x.Image]
ways = pytest.mark.parametrize("opens", [by_path, past_the_page_cache, by_python])


@ways
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize(
    ("size", "clusters"), [(4 * KIB, 100), (64 * KIB, 40), (2 * MIB, 5)], ids=["4k", "64k", "2m"]
)
def test_reads_one_after_another(
    tmp_path: Path, opens: Opens, kind: str, size: int, clusters: int
) -> None:
    path = tmp_path / "disk.qcow2"
    content = packed(path, clusters, size, kind)
    for step in (4 * KIB, 64 * KIB, 100_000, MIB):
        with opens(path) as image:
            for _ in range(2):
                for at in range(0, len(content), step):
                    assert image.pread(step, at) == content[at : at + step], (step, at)


@ways
def test_two_who_read_one_after_another(tmp_path: Path, opens: Opens) -> None:
    path = tmp_path / "disk.qcow2"
    content = packed(path, 64)
    half = len(content) // 2
    with opens(path) as image:
        for at in range(0, half, 16 * KIB):
            assert image.pread(16 * KIB, at) == content[at : at + 16 * KIB]
            assert image.pread(16 * KIB, half + at) == content[half + at : half + at + 16 * KIB]


def test_who_reads_on_and_on_waits_seldom(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    content = packed(path, 64)
    storage = Counting(path)
    with qcow2x.open(storage) as image:
        assert (
            b"".join(image.pread(4 * KIB, at) for at in range(0, len(content), 4 * KIB)) == content
        )
    # One cluster, then 2, 4, 8, 8 ... at a time.
    assert len(storage.fetches) == 11
    assert sum(storage.fetches) < 1.1 * path.stat().st_size


def test_who_reads_here_and_there_fetches_what_he_reads(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    content = packed(path, 64)
    storage = Counting(path)
    order = list(range(0, 64, 2))
    random.Random(1).shuffle(order)
    with qcow2x.open(storage) as image:
        for cluster in order:
            at = cluster * 64 * KIB + 8 * KIB
            assert image.pread(4 * KIB, at) == content[at : at + 4 * KIB]
    assert len(storage.fetches) == 32
    assert sum(storage.fetches) < 0.6 * path.stat().st_size


def test_three_who_read_on_and_on_do_not_decode_for_nothing(tmp_path: Path) -> None:
    """What is kept has room for two of them: with more, less is decoded ahead."""
    path = tmp_path / "disk.qcow2"
    content = packed(path, 128)
    storage = Counting(path)
    part = len(content) // 4
    with qcow2x.open(storage) as image:
        for at in range(0, part, 16 * KIB):
            for start in range(0, len(content), part):
                got = image.pread(16 * KIB, start + at)
                assert got == content[start + at : start + at + 16 * KIB]
    assert sum(storage.fetches) < 2 * path.stat().st_size


def test_a_large_request_fetches_what_lies_together_at_once(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    content = packed(path, 16)
    storage = Counting(path)
    with qcow2x.open(storage) as image:
        assert image.pread(len(content), 0) == content
    assert len(storage.fetches) <= 2


@ways
def test_many_requests_of_one_call(tmp_path: Path, opens: Opens) -> None:
    path = tmp_path / "disk.qcow2"
    content = packed(path, 100)
    rng = random.Random(2)
    with opens(path) as image:
        for count in (3, 63, 64, 65, 200):
            places = [rng.randrange(len(content)) for _ in range(count)]
            wanted = [(bytearray(rng.randrange(1, 150 * KIB)), at) for at in places]
            lengths = image.preadv_many(wanted)
            for (buffer, at), length in zip(wanted, lengths, strict=True):
                assert length == min(len(buffer), len(content) - at)
                assert buffer[:length] == content[at : at + length]


def test_parts_of_one_cluster_in_one_call_decode_it_once(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    content = packed(path, 4)
    storage = Counting(path)
    with qcow2x.open(storage) as image:
        wanted = [(bytearray(4 * KIB), at) for at in range(0, len(content), 4 * KIB)]
        image.preadv_many(wanted)
        assert b"".join(bytes(buffer) for buffer, _ in wanted) == content
    assert len(storage.fetches) == 1


@ways
@pytest.mark.not_for_qemu("damaged")
def test_what_is_wrong_ahead_is_told_when_it_is_asked_for(tmp_path: Path, opens: Opens) -> None:
    path = tmp_path / "disk.qcow2"
    content = packed(path, 32)
    raw = bytearray(path.read_bytes())
    offset, nbytes = stream_of(path, 20)
    raw[offset : offset + nbytes // 2] = b"\xff" * (nbytes // 2)
    path.write_bytes(raw)
    with opens(path) as image:
        failed = set()
        for at in range(0, len(content), 16 * KIB):
            try:
                assert image.pread(16 * KIB, at) == content[at : at + 16 * KIB]
            except qcow2x.CorruptImage as exc:
                assert f"{offset:#x}" in str(exc) or str(offset) in str(exc)
                failed.add(at // (64 * KIB))
        assert failed == {20}
        # Also of many in a call the first one in their order.
        wanted = [(bytearray(64 * KIB), at) for at in range(0, len(content), 64 * KIB)]
        with pytest.raises(qcow2x.CorruptImage):
            image.preadv_many(wanted)
        good = [(buffer, at) for buffer, at in wanted if at // (64 * KIB) not in failed]
        image.preadv_many(good)
        assert all(buffer == content[at : at + 64 * KIB] for buffer, at in good)


def test_readers_while_clusters_change(tmp_path: Path) -> None:
    """Each cluster holds one of a few patterns, all of it the same; readers go on and on, and may meet
    the pattern before or the one after."""
    size, count = 4 * KIB, 64
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
                first = rng.randrange(count)
                for n in range(first, count):
                    got = image.pread(512, n * size + 512 * rng.randrange(8))
                    if got not in patterns[n]:
                        wrong.append((n, got[:8]))
                        return
        except Exception as exc:
            wrong.append(exc)

    with qcow2x.open(path, "r+", cache="none") as image:
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
    check_clean(path)
