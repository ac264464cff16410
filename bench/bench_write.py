"""Writes beside os.pwritev on a raw file and qemu-img bench: into an image that grows, made anew
for each round, and, apart from that, into one in which every byte was written before."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

import qcow2x
from qcow2x.demo import race
from qcow2x.demo.race import Load

SIZE = 256 << 20
ALL_MODES = ("writeback", "none", "directsync")
KIB = 1 << 10


def loads(cache: str, nbytes: int) -> Load:
    """Enough requests for a time that means something, in a mode as slow as this one."""
    count = {"writeback": 3000, "none": 800, "directsync": 200}[cache]
    if nbytes == 4 * KIB:
        return Load.scattered(nbytes, count * (4 if cache == "writeback" else 1), SIZE)
    return Load.sequential(nbytes, count, SIZE)


def time_side_by_side(load: Load, image: qcow2x.Image, fd: int) -> list[float]:
    return race.alternate(
        load,
        lambda part: race.time_image_writes(part, image),
        lambda part: race.time_raw_writes(part, fd),
    )


@pytest.fixture(scope="module")
def used(folder):
    """Disks in which every byte has been written, by who writes to them."""
    paths = {who: folder / f"used-{who}" for who in ("raw", "qcow2x", "qemu")}
    fd = race.open_raw(paths["raw"], "writeback", SIZE)
    race.fill(lambda data, off: os.pwritev(fd, [data], off), SIZE)
    os.close(fd)
    qcow2x.create(paths["qcow2x"], SIZE)
    with qcow2x.open(paths["qcow2x"], "r+") as image:
        race.fill(image.pwrite, SIZE)
    race.create_qemu(paths["qemu"], SIZE)
    race.time_qemu(
        Load.sequential(1 << 20, SIZE >> 20, SIZE), paths["qemu"], "writeback", write=True
    )
    yield paths
    for path in paths.values():
        path.unlink()


@pytest.fixture(scope="module")
def qemu_aio(folder):
    """What serves QEMU best here, by cache mode."""
    known: dict[str, str] = {}

    def fastest(cache: str) -> str:
        if cache not in known:
            known[cache] = race.fastest_qemu_aio(folder, cache)
        return known[cache]

    return fastest


@pytest.mark.parametrize("nbytes", [4 * KIB, 64 * KIB], ids=["4k", "64k"])
@pytest.mark.parametrize("cache", ALL_MODES, indirect=True)
def bench_rewrite(used, versus, qemu_aio, cache, nbytes):
    load = loads(cache, nbytes)

    def prepare(who):
        (race.make_warm if cache == "writeback" else race.make_cold)(used[who])
        return used[who]

    def one_round():
        fd = race.open_raw(prepare("raw"), cache)
        with qcow2x.open(prepare("qcow2x"), "r+", cache=cache) as image:
            ours, raw = time_side_by_side(load, image, fd)
        race.close_raw(fd)
        path = prepare("qemu")
        qemu = race.time_qemu(load, path, cache, write=True, aio=qemu_aio(cache))
        return {"qcow2x": ours, "os.pwritev": raw, "qemu-img bench": qemu}

    versus(
        f"rewrite {nbytes // KIB} KiB, {cache}",
        one_round,
        requests=load.count,
        targets={"os.pwritev": 0.95},
    )


@pytest.mark.parametrize("nbytes", [4 * KIB, 64 * KIB], ids=["4k", "64k"])
@pytest.mark.parametrize("cache", ALL_MODES, indirect=True)
def bench_grow(folder, versus, qemu_aio, cache, nbytes):
    """Into a sparse file and into empty images, made anew for each round."""
    load = loads(cache, nbytes)
    if nbytes == 4 * KIB:
        # Each request makes a fragment of its own, which file systems are slow to remove.
        load = replace(load, count=min(load.count, 1000))
    paths = {who: folder / f"growing-{who}" for who in ("raw", "qcow2x", "qemu")}

    def one_round():
        fd = race.open_raw(paths["raw"], cache, SIZE)
        qcow2x.create(paths["qcow2x"], SIZE)
        with qcow2x.open(paths["qcow2x"], "r+", cache=cache) as image:
            ours, raw = time_side_by_side(load, image, fd)
        race.close_raw(fd)
        race.create_qemu(paths["qemu"], SIZE)
        qemu = race.time_qemu(load, paths["qemu"], cache, write=True, aio=qemu_aio(cache))
        for path in paths.values():
            path.unlink()
        return {"qcow2x": ours, "os.pwritev": raw, "qemu-img bench": qemu}

    # The targets are for what the page cache takes; the durable modes have theirs later.
    is_target = cache == "writeback" and nbytes == 64 * KIB
    versus(
        f"grow {nbytes // KIB} KiB {'scattered' if nbytes == 4 * KIB else 'sequential'}, {cache}",
        one_round,
        requests=load.count,
        targets={"os.pwritev": 0.9, "qemu-img bench": 1.0} if is_target else {},
    )
