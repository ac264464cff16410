"""Writes beside os.pwritev on a raw file and qemu-img bench: into disks that grow, made anew for each
round, and, apart from that, into disks in which every byte was written before.

Rewriting, all three write to the same blocks of the same file: an image whose clusters lie in order,
which is a raw disk from some offset on. Where on the host's disk a file lies makes a difference of up
to 10 %, much more than there is to measure.

The raw file is written by os.pwritev, as it is read by os.preadv; os.pwrite, without a list to take apart,
is 0.08 us faster, which 4 KiB into the page cache (0.7 us) show and nothing else does. The raw file's 32
requests at once come from 32 threads: os has no other way. QEMU and qcow2x are each
asked in the way that serves them best on this machine."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from loads import WAYS, Way, by_threads, fastest_way, many_at_once, side_by_side
from table import KIB, MIB, QEMU, RAW, Round

import qcow2x
from qcow2x.demo import race
from qcow2x.demo.race import Load

SIZE = 256 * MIB
PLACES = 5
MODES = ("writeback", "none", "writethrough", "directsync")
#: Requests that take a tenth of a second or so one at a time, by mode and size.
COUNTS = {
    "writeback": {4 * KIB: 8000, 64 * KIB: 2000, MIB: 200},
    "none": {4 * KIB: 1500, 64 * KIB: 800, MIB: 100},
    "writethrough": {4 * KIB: 600, 64 * KIB: 600, MIB: 50},
    "directsync": {4 * KIB: 1000, 64 * KIB: 600, MIB: 50},
}
#: Each scattered request makes a fragment of its own in a file that grows, which file systems are slow
#: to remove.
MOST_FRAGMENTS = 1000


def load_for(cache: str, nbytes: int, pattern: str, depth: int, *, grows: bool) -> Load:
    count = COUNTS[cache][nbytes]
    if depth > 1 and cache != "writeback":
        # A new image has its tables to load, which takes a millisecond: 3 % of 1,200 requests of 30 us.
        count *= 2 if grows else 6
    if pattern == "sequential":
        return Load.sequential(nbytes, min(count, SIZE // nbytes), SIZE)
    if grows:
        count = min(count, MOST_FRAGMENTS)
    return Load.scattered(nbytes, min(count, SIZE // nbytes), SIZE)


def name_of(work: str, nbytes: int, pattern: str, cache: str, depth: int) -> str:
    size = f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"
    return f"{work} {size} {pattern}, {cache}, depth {depth}"


def time_ours_and_raw(
    load: Load,
    image: qcow2x.Image,
    fd: int,
    depth: int,
    turn: int,
    way: Way,
    base: int = 0,
) -> list[tuple[float, float]]:
    if depth == 1:
        return side_by_side(
            load,
            turn,
            lambda part: race.time_image_writes(part, image),
            lambda part: race.time_raw_writes(replace(part, base=base), fd),
            stretch=1,
        )
    return side_by_side(
        load,
        turn,
        lambda part: way(part, image.pwrite, image.pwritev_many, depth),
        lambda part: many_at_once(
            replace(part, base=base), lambda data, off: os.pwritev(fd, [data], off), depth
        ),
        # At the end of each stretch fewer and fewer are under way, which qemu-img bench has once only:
        # of 128 requests of 4 KiB that was a seventh of the time.
        stretch=16 * depth,
    )


@pytest.fixture(scope="module")
def used(folder):
    """Disks in which every byte has been written, each with the offset of its first byte in the file;
    several, for rounds to take turns with."""
    disks = []
    for n in range(PLACES):
        path = folder / f"used-{n}"
        qcow2x.create(path, SIZE, preallocation="metadata")
        with qcow2x.open(path, "r+") as image:
            race.fill(image.pwrite, SIZE)
            (whole,) = image.extents()
        assert whole.length == SIZE
        assert whole.host_offset is not None
        disks.append((path, whole.host_offset))
    yield disks
    for path, _ in disks:
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


ALL = [
    pytest.mark.parametrize("depth", [1, 32], ids="depth{}".format),
    pytest.mark.parametrize("pattern", ["sequential", "scattered"]),
    pytest.mark.parametrize("nbytes", [4 * KIB, 64 * KIB, MIB], ids=["4k", "64k", "1m"]),
    pytest.mark.parametrize("cache", MODES, indirect=True),
]


def every_kind(function):
    for mark in ALL:
        function = mark(function)
    return function


def tags_of(work: str, nbytes: int, pattern: str, cache: str, depth: int) -> dict[str, object]:
    # The plots show one request at a time; all rows would be too many.
    plot = (
        work
        if depth == 1 and nbytes < MIB and cache in ("writeback", "none", "directsync")
        else None
    )
    return {"work": work, "nbytes": nbytes, "pattern": pattern, "cache": cache, "depth": depth,
            "plot": plot}  # fmt: skip


@every_kind
def bench_rewrite(used, versus, qemu_aio, cache, nbytes, pattern, depth):
    load = load_for(cache, nbytes, pattern, depth, grows=False)
    way = by_threads
    if depth > 1:
        with qcow2x.open(used[0][0], "r+", cache=cache) as image:
            way = fastest_way(lambda way: way(load, image.pwrite, image.pwritev_many, depth))
    turns = iter(range(1 << 20))
    warm = set()

    def one_round():
        turn = next(turns)
        path, base = used[turn % PLACES]
        if race.RAW_FLAGS[cache] & os.O_DIRECT:
            race.make_cold(path)
        elif path not in warm:
            # Half a second: and the pages stay as they are, whoever writes to them.
            race.make_warm(path)
            warm.add(path)
        fd = race.open_raw(path, cache)
        with qcow2x.open(path, "r+", cache=cache) as image:
            pairs = time_ours_and_raw(load, image, fd, depth, turn, way, base)
        race.close_raw(fd)
        this = Round.of(RAW, pairs, alike=True)
        aio = qemu_aio(cache)
        this.seconds[QEMU] = race.time_qemu(load, path, cache, write=True, aio=aio, depth=depth)
        return this

    kind = ("rewrite", nbytes, pattern, cache, depth)
    name = name_of("rewrite", nbytes, pattern, cache, depth)
    versus(name + WAYS[way], one_round, requests=load.count, tags=tags_of(*kind))


@every_kind
def bench_grow(folder, versus, qemu_aio, cache, nbytes, pattern, depth):
    """Into a sparse file and into empty images, made anew for each round."""
    load = load_for(cache, nbytes, pattern, depth, grows=True)
    paths = {who: folder / f"growing-{who}" for who in ("raw", "qcow2x", "qemu")}
    turns = iter(range(1 << 20))

    def grow(way):
        qcow2x.create(paths["qcow2x"], SIZE)
        with qcow2x.open(paths["qcow2x"], "r+", cache=cache) as image:
            taken = way(load, image.pwrite, image.pwritev_many, depth)
        paths["qcow2x"].unlink()
        return taken

    way = fastest_way(grow) if depth > 1 else by_threads

    def one_round():
        fd = race.open_raw(paths["raw"], cache, SIZE)
        qcow2x.create(paths["qcow2x"], SIZE)
        with qcow2x.open(paths["qcow2x"], "r+", cache=cache) as image:
            pairs = time_ours_and_raw(load, image, fd, depth, next(turns), way)
        race.close_raw(fd)
        race.create_qemu(paths["qemu"], SIZE)
        aio = qemu_aio(cache)
        this = Round.of(RAW, pairs, alike=False)
        qemu = race.time_qemu(load, paths["qemu"], cache, write=True, aio=aio, depth=depth)
        this.seconds[QEMU] = qemu
        for path in paths.values():
            path.unlink()
        return this

    kind = ("grow", nbytes, pattern, cache, depth)
    name = name_of("grow", nbytes, pattern, cache, depth)
    versus(name + WAYS[way], one_round, requests=load.count, tags=tags_of(*kind))
