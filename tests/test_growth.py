"""Growth ahead of the writer: what is reserved and linked ahead, and what is left of it at the end."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path

import pytest
from cli_helpers import qemu_img

import qcow2x

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB


def new(path: Path, **options: object) -> Path:
    qcow2x.create(path, SIZE, **options)
    return path


def runs(path: Path) -> list[tuple[int, int]]:
    """What is mapped to data."""
    with qcow2x.open(path, references="follow") as image:
        return [(run.offset, run.length) for run in image.extents(layers=1) if run.data]


class Disk:
    """Python's own storage, that has room for so many bytes and counts nothing but its end."""

    def __init__(self, room: int) -> None:
        self.data = bytearray()
        self.room = room

    def size(self) -> int:
        return len(self.data)

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def pwrite(self, data: bytes, offset: int) -> int:
        end = offset + len(data)
        if end > self.room:
            raise OSError(28, "No space left on device")
        self.data.extend(bytes(max(0, end - len(self.data))))
        self.data[offset:end] = data
        return len(data)

    def flush(self) -> None:
        pass

    def truncate(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))


@pytest.mark.parametrize("cache", ["writethrough", "directsync"])
def test_who_writes_on_touches_no_metadata(tmp_path: Path, cache: str) -> None:
    path = new(tmp_path / "image")
    with qcow2x.open(path, "r+", cache=cache) as image:
        for cluster in range(256):
            image.pwrite(b"\x5a" * 64 * KIB, cluster * 64 * KIB)
        # Plain growth writes a refcount and a mapping for each of the 256.
        assert image.stats().metadata_writes < 32
        assert image.pread(SIZE, 0) == b"\x5a" * (16 * MIB) + bytes(SIZE - 16 * MIB)
    assert runs(path) == [(0, 16 * MIB)]


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}, {"cluster_size": 4 * KIB}], ids=str)
def test_what_was_not_used_is_given_back(tmp_path: Path, options: dict[str, object]) -> None:
    ahead, plain = new(tmp_path / "ahead", **options), new(tmp_path / "plain", **options)
    for path, growth in ((ahead, "ahead"), (plain, "plain")):
        with qcow2x.open(path, "r+", cache="writethrough", growth=growth) as image:
            for block in range(100):
                image.pwrite(bytes([block + 1]) * 4 * KIB, block * 4 * KIB)
            image.pwrite(b"far" * 100, 40 * MIB)
            if growth == "ahead":
                grown = path.stat().st_size
    cluster = qcow2x.open(ahead).cluster_size
    assert runs(ahead)[0][1] == -(-400 * KIB // cluster) * cluster
    assert runs(ahead)[-1][0] == 40 * MIB
    assert ahead.stat().st_size < grown
    qemu_img("check", ahead)
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", ahead, plain)


@pytest.mark.leaks("the image is looked at while it is open, as a crash would leave it")
def test_a_crash_leaks_and_loses_nothing(tmp_path: Path) -> None:
    path = new(tmp_path / "image")
    with qcow2x.open(path, "r+", cache="writethrough") as image:
        for cluster in range(40):
            image.pwrite(bytes([cluster + 1]) * 64 * KIB, cluster * 64 * KIB)
        shutil.copy(path, tmp_path / "crashed")
    qemu_img("check", tmp_path / "crashed", ok=(0, 3))
    with qcow2x.open(tmp_path / "crashed") as image:
        for cluster in range(40):
            assert image.pread(64 * KIB, cluster * 64 * KIB) == bytes([cluster + 1]) * 64 * KIB
        assert not any(image.pread(SIZE - 40 * 64 * KIB, 40 * 64 * KIB))


@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB])
def test_zeros_of_a_reserve_are_seen_where_old_data_was_in_the_cache(
    tmp_path: Path, cluster_size: int
) -> None:
    """In writethrough the zeros go past the page cache, in which the clusters' last bytes still lie."""
    path = new(tmp_path / "disk", cluster_size=cluster_size)
    random_ = random.Random(cluster_size)
    model = bytearray(SIZE)
    with qcow2x.open(path, "r+", cache="writethrough", discard_to_host=False) as image:
        for turn in range(4):
            start = turn * 8 * MIB
            for at in range(start, start + 3 * MIB, 64 * KIB):
                data = random_.randbytes(random_.choice([4 * KIB, 64 * KIB]))
                image.pwrite(data, at)
                model[at : at + len(data)] = data
            assert image.pread(4 * MIB, start) == model[start : start + 4 * MIB]
            image.discard(start, 2 * MIB)
            model[start : start + 2 * MIB] = bytes(2 * MIB)
        assert image.pread(SIZE, 0) == model
    qemu_img("check", path)
    with qcow2x.open(path) as image:
        assert image.pread(SIZE, 0) == model


def test_nothing_is_linked_over_what_a_backing_file_shows(tmp_path: Path) -> None:
    base = new(tmp_path / "base")
    with qcow2x.open(base, "r+") as image:
        image.pwrite(b"\xba" * MIB, 2 * MIB)
        image.pwrite(b"\x5e" * 64 * KIB, 5 * MIB)
    path = tmp_path / "top"
    qcow2x.create(path, 2 * SIZE, backing_file=str(base), backing_format="qcow2")
    model = bytearray(qcow2x.open(base).pread(SIZE, 0)) + bytes(SIZE)
    with qcow2x.open(path, "r+", references="follow", cache="writethrough") as image:
        for start in (0, 4 * MIB, SIZE - MIB):
            for block in range(96):
                at = start + block * 16 * KIB
                data = bytes([block + 1]) * 8 * KIB
                image.pwrite(data, at)
                model[at : at + len(data)] = data
                if block % 8 == 0:
                    assert image.pread(2 * SIZE, 0) == model
        image.check()
    with qcow2x.open(path, references="follow") as image:
        assert image.pread(2 * SIZE, 0) == model


def test_what_was_linked_ahead_may_be_discarded_and_written_again(tmp_path: Path) -> None:
    path = new(tmp_path / "image")
    rng = random.Random(4)
    model = bytearray(SIZE)
    with qcow2x.open(path, "r+", cache="writethrough") as image:
        at = 0
        for turn in range(600):
            what = rng.choice(("on", "on", "on", "discard", "zero", "compress", "far", "flush"))
            near = min(SIZE - MIB, max(0, at + 64 * KIB * rng.randrange(-8, 24)))
            near -= near % (64 * KIB)
            data = bytes([turn % 255 + 1]) * rng.choice((512, 4 * KIB, 64 * KIB, 200 * KIB))
            if what == "on":
                image.pwrite(data, at)
                model[at : at + len(data)] = data
                at = (at + len(data)) % (SIZE - MIB)
            elif what == "far":
                image.pwrite(data, near)
                model[near : near + len(data)] = data
            elif what == "compress":
                image.pwrite_compressed(data[:1] * 64 * KIB, near)
                model[near : near + 64 * KIB] = data[:1] * 64 * KIB
            elif what == "flush":
                image.flush()
            else:
                length = 64 * KIB * rng.randrange(1, 6)
                if what == "discard":
                    image.discard(near, length)
                else:
                    image.write_zeroes(near, length)
                model[near : near + length] = bytes(length)
        assert image.pread(SIZE, 0) == model
    with qcow2x.open(path) as image:
        assert image.pread(SIZE, 0) == model


def test_snapshots_meet_what_was_linked_ahead(tmp_path: Path) -> None:
    path = new(tmp_path / "image")
    model = bytearray(SIZE)
    with qcow2x.open(path, "r+", cache="writethrough") as image:
        at = 0
        kept = {}
        for turn in range(6):
            for _ in range(30):
                data = bytes([turn + 1]) * 16 * KIB
                image.pwrite(data, at)
                model[at : at + len(data)] = data
                at += len(data)
            if turn in (1, 2, 4):
                kept[f"s{turn}"] = bytes(model)
                image.snapshots.create(f"s{turn}")
            if turn == 3:
                image.snapshots.delete("s1")
                del kept["s1"]
                image.snapshots.apply("s2")
                model[:] = kept["s2"]
        assert image.pread(SIZE, 0) == model
        assert not image.check().findings
    with qcow2x.open(path) as image:
        assert image.pread(SIZE, 0) == model
        for name, content in kept.items():
            with image.snapshots.open(name) as then:
                assert then.pread(SIZE, 0) == content


def test_a_check_finds_nothing_reserved(tmp_path: Path) -> None:
    path = new(tmp_path / "image")
    with qcow2x.open(path, "r+", cache="writethrough") as image:
        for turn in range(3):
            for cluster in range(20):
                image.pwrite(b"x" * 64 * KIB, (20 * turn + cluster) * 64 * KIB)
            found = image.check()
            assert (found.leaks, found.corruptions) == (0, 0)


def test_where_there_is_no_room_for_a_reserve_there_is_for_a_write() -> None:
    disk = Disk(room=1 << 40)
    qcow2x.create(disk, SIZE)
    disk.room = len(disk.data) + 300 * KIB
    image = qcow2x.open(disk, "r+", cache="writethrough")
    written = 0
    with pytest.raises(OSError, match="No space left"):
        for cluster in range(20):
            image.pwrite(bytes([cluster + 1]) * 64 * KIB, cluster * 64 * KIB)
            written = cluster + 1
    assert written >= 2
    disk.room += 40 * MIB
    for cluster in range(written, 60):
        image.pwrite(bytes([cluster + 1]) * 64 * KIB, cluster * 64 * KIB)
    image.close()
    with qcow2x.open(disk) as image:
        assert not image.check().corruptions
        for cluster in range(60):
            assert image.pread(64 * KIB, cluster * 64 * KIB) == bytes([cluster + 1]) * 64 * KIB


@pytest.mark.parametrize("cluster_size", [512, 64 * KIB])
def test_threads_that_grow_the_same_image(tmp_path: Path, cluster_size: int) -> None:
    path = new(tmp_path / "image", cluster_size=cluster_size)
    failures = []
    blocks = list(range(256))
    random.Random(1).shuffle(blocks)

    def place(number: int, turn: int) -> int:
        """Two together move on through one half of the disk, two write here and there in the other."""
        return 16 * KIB * (2 * turn + number if number < 2 else 512 + blocks[2 * turn + number - 2])

    def one(image: qcow2x.Image, number: int) -> None:
        try:
            for turn in range(64):
                image.pwrite(bytes([number + 1]) * 16 * KIB, place(number, turn))
        except BaseException as exc:
            failures.append(exc)

    with qcow2x.open(path, "r+", cache="writethrough") as image:
        threads = [threading.Thread(target=one, args=(image, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
    with qcow2x.open(path) as image:
        for number in range(4):
            for turn in range(64):
                assert image.pread(16 * KIB, place(number, turn)) == bytes([number + 1]) * 16 * KIB
        step = max(cluster_size, 16 * KIB)
        used = {place(number, turn) // step for number in range(4) for turn in range(64)}
        assert sum(run.length for run in image.extents() if run.data) == len(used) * step


@pytest.mark.parametrize("size", [4 * KIB, 64 * KIB], ids=["small", "whole"])
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_writes_that_grow_together(tmp_path: Path, cache: str, size: int) -> None:
    path = new(tmp_path / "image")
    data = {at * size: bytes([at % 255 + 1]) * size for at in range(128)}
    scattered = {40 * MIB + at * 128 * KIB: b"\x77" * size for at in range(64)}
    with qcow2x.open(path, "r+", cache=cache, growth="together") as image:
        for requests in (data, scattered):
            parts = [(part, off) for off, part in requests.items()]
            for i in range(0, len(parts), 16):
                image.pwritev_many(parts[i : i + 16])
        image.flush()
        mapped = sum(run.length for run in image.extents() if run.data)
        # A crash now: what was reserved leaks, no more.
        lost = shutil.copy(path, tmp_path / "lost")
    for image_path in (path, lost):
        with qcow2x.open(image_path) as image:
            for off, part in (data | scattered).items():
                assert image.pread(size, off) == part
            assert image.pread(MIB, 16 * MIB) == bytes(MIB)
    used = {off // (64 * KIB) for off in data | scattered}
    assert sum(length for _, length in runs(path)) == len(used) * 64 * KIB < mapped
    qemu_img("check", "-f", "qcow2", str(path))
    qemu_img("check", "-f", "qcow2", "-r", "leaks", str(lost))


def test_one_write_at_a_time_grows_plainly_without_the_page_cache(tmp_path: Path) -> None:
    path = new(tmp_path / "image")
    with qcow2x.open(path, "r+", cache="none") as image:
        for cluster in range(32):
            image.pwrite(b"\x5a" * 64 * KIB, cluster * 64 * KIB)
        assert path.stat().st_size < 3 * MIB


def test_growth_is_one_of_four(tmp_path: Path) -> None:
    path = new(tmp_path / "image")
    with pytest.raises(ValueError, match="growth must be one of auto, plain, together, ahead"):
        qcow2x.open(path, "r+", growth="fast")
