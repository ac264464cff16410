"""Where a disk lies that was filled in order is known from a few bytes, through a cache far too small for its
tables; and what is known stays true whatever changes."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from support.qemu import check_clean, compare_bytes, qemu_img

import qcow2x

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
#: The smallest there is: 64 slices, and an eighth of that for condensed ones.
SMALLEST = 1


def slices_of(size: int, cluster_size: int, extended: bool = False) -> range:
    entries = min(cluster_size, 4096) // (16 if extended else 8)
    return range(0, size, entries * cluster_size)


def look_at_all(image: qcow2x.Image, places: range) -> int:
    """One byte below each slice; how many slices were read from the file."""
    before = image.stats().l2_loads
    for at in places:
        image.pread(1, at)
    return image.stats().l2_loads - before


@pytest.mark.parametrize("extended", [False, True])
def test_a_disk_filled_in_order_is_looked_up_once(tmp_path: Path, extended: bool) -> None:
    path = tmp_path / "disk.qcow2"
    size, cluster = 8 * MIB, 512
    if extended:
        size, cluster = 768 * MIB, 16 * KIB
    qcow2x.create(path, size, cluster_size=cluster, extended_l2=extended)
    data = random.Random(1).randbytes(MIB)
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        for at in range(0, size, MIB):
            image.pwrite(data, at)
    places = slices_of(size, cluster, extended)
    assert len(places) > 2 * 64
    with qcow2x.open(path, l2_cache_size=SMALLEST) as image:
        look_at_all(image, places)
        # A table of refcounts lies within the run of one slice in so many.
        assert look_at_all(image, places) <= len(places) / 20
        for at in range(0, size, MIB):
            assert image.pread(MIB, at) == data
        stats = image.stats()
        assert stats.l2_evictions > 0
        assert stats.l2_cache_bytes <= stats.l2_cache_limit


def test_8_mib_serve_a_disk_of_1_tib(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1024 * GIB, preallocation="metadata")
    places = slices_of(1024 * GIB, 64 * KIB)
    with qcow2x.open(path, l2_cache_size=8 * MIB) as image:
        # Neighbours are read together also when there is memory only for what little they say.
        assert look_at_all(image, places) <= len(places) / 4
        assert look_at_all(image, places) <= len(places) / 100
        assert image.stats().l2_cache_bytes <= 8 * MIB


def test_images_of_qemu(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img(
        "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,preallocation=metadata", path, "1G"
    )
    places = slices_of(GIB, 4 * KIB)
    assert len(places) > 2 * 64
    with qcow2x.open(path, l2_cache_size=SMALLEST) as image:
        look_at_all(image, places)
        assert look_at_all(image, places) <= len(places) / 20


def change(image: qcow2x.Image, model: bytearray, rng: random.Random, names: list[str]) -> None:
    """One change of any kind, to the image and to the model of it."""
    size = len(model)
    length = rng.choice([512, 4 * KIB, 32 * KIB, 128 * KIB])
    at = rng.randrange(0, size - length + 1, 512)
    kind = rng.choice(
        ["write", "write", "discard", "zero", "compress", "snapshot", "flush", "read"]
    )
    if kind == "write":
        data = rng.randbytes(length)
        image.pwrite(data, at)
        model[at : at + length] = data
    elif kind == "discard":
        image.discard(at, length)
        model[at : at + length] = bytes(length)
    elif kind == "zero":
        image.write_zeroes(at, length)
        model[at : at + length] = bytes(length)
    elif kind == "compress":
        data = bytes([rng.randrange(256)]) * 512
        image.pwrite_compressed(data, at)
        model[at : at + 512] = data
    elif kind == "snapshot":
        if names and rng.random() < 0.5:
            image.snapshots.delete(names.pop())
        elif len(names) < 3:
            names.append(f"at-{rng.randrange(1 << 30)}")
            image.snapshots.create(names[-1])
    elif kind == "flush":
        image.flush()
    else:
        assert image.pread(length, at) == model[at : at + length]


@pytest.mark.parametrize("seed", range(8))
def test_every_kind_of_change(tmp_path: Path, seed: int) -> None:
    """A disk of four times the slices that fit, filled in order, so that most are condensed when they
    are changed."""
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    model = bytearray(rng.randbytes(8 * MIB))
    qcow2x.create(path, len(model), cluster_size=512)
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        image.pwrite(model, 0)
    names: list[str] = []
    for _ in range(4):
        with qcow2x.open(path, "r+", cache="unsafe", l2_cache_size=SMALLEST) as image:
            for _ in range(150):
                change(image, model, rng, names)
                for at in slices_of(len(model), 512)[:: rng.randrange(8, 40)]:
                    assert image.pread(512, at) == model[at : at + 512]
            assert image.pread(len(model), 0) == model
    check_clean(path)
    compare_bytes(path, model)


def test_threads_that_change_beside_threads_that_read(tmp_path: Path) -> None:
    """Each writer has an eighth of the disk; readers look at clusters that nobody changes."""
    path = tmp_path / "disk.qcow2"
    size, writers = 16 * MIB, 4
    model = bytearray(random.Random(0).randbytes(size))
    qcow2x.create(path, size, cluster_size=512)
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        image.pwrite(model, 0)
    failures: list[BaseException] = []
    part = size // 2 // writers

    def write(number: int) -> None:
        rng = random.Random(number)
        for _ in range(400):
            at = number * part + rng.randrange(0, part - 32 * KIB, 512)
            if rng.random() < 0.5:
                image.discard(at, 16 * KIB)
                model[at : at + 16 * KIB] = bytes(16 * KIB)
            data = rng.randbytes(4 * KIB)
            image.pwrite(data, at)
            model[at : at + len(data)] = data
            seen = number * part + rng.randrange(0, part - 4 * KIB, 512)
            assert image.pread(4 * KIB, seen) == model[seen : seen + 4 * KIB]

    def read(number: int) -> None:
        rng = random.Random(100 + number)
        for _ in range(3000):
            at = rng.randrange(size // 2, size - 512, 512)
            assert image.pread(512, at) == model[at : at + 512]

    def guarded(job, number: int) -> None:
        try:
            job(number)
        except BaseException as exc:
            failures.append(exc)

    with qcow2x.open(path, "r+", cache="writeback", l2_cache_size=SMALLEST) as image:
        jobs = [(write, n) for n in range(writers)] + [(read, n) for n in range(4)]
        threads = [threading.Thread(target=guarded, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert image.pread(size, 0) == model
    check_clean(path)
    compare_bytes(path, model)
