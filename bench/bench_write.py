"""Writes beside os.pwritev on a raw file and qemu-img bench: into disks that grow, made anew for each
round, and, apart from that, into disks in which every byte was written before.

Rewriting, all three write to the same blocks of the same file: an image whose clusters lie in order,
which is a raw disk from some offset on. Where on the host's disk a file lies makes a difference of up
to 10 %, much more than there is to measure.

The raw file is written by os.pwritev, as it is read by os.preadv; os.pwrite, without a list to take apart,
is 0.08 us faster, which 4 KiB into the page cache (0.7 us) show and nothing else does. 32 requests at once
are one call of ours, pwritev_many; the raw file's come from 32 threads: os has no other way. QEMU is asked in
the way that serves it best, row by row, and has all of its requests in one go: so have ours beside it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from loads import many_at_once, one_call, side_by_side
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
        lambda part: one_call(part, image.pwritev_many, depth),
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


def time_ours(load: Load, path: Path, cache: str, depth: int) -> float:
    """Into an image that was opened for it, as QEMU's is."""
    with qcow2x.open(path, "r+", cache=cache) as image:
        if depth == 1:
            return race.time_image_writes(load, image)
        return one_call(load, image.pwritev_many, depth)


@every_kind
def bench_rewrite(used, versus, qemu, cache, nbytes, pattern, depth):
    load = load_for(cache, nbytes, pattern, depth, grows=False)
    turns = iter(range(1 << 20))
    warm = set()

    def time_qemu(aio, path=used[0][0]):
        return qemu.time(load, path, cache, write=True, aio=aio, depth=depth)

    aio = qemu.fastest_aio(cache, time_qemu)

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
            pairs = time_ours_and_raw(load, image, fd, depth, turn, base)
        race.close_raw(fd)
        this = Round.of(RAW, pairs, alike=True)
        if turn % 2:
            qemus = time_qemu(aio, path)
            ours = time_ours(load, path, cache, depth)
        else:
            ours = time_ours(load, path, cache, depth)
            qemus = time_qemu(aio, path)
        this.seconds[QEMU] = qemus
        this.stretches[QEMU] = [(ours, qemus)]
        return this

    versus(
        name_of("rewrite", nbytes, pattern, cache, depth),
        one_round,
        requests=load.count,
        tags=tags_of("rewrite", nbytes, pattern, cache, depth),
    )


@every_kind
def bench_grow(folder, versus, qemu, cache, nbytes, pattern, depth):
    """Into a sparse file and into empty images, made anew for each round."""
    load = load_for(cache, nbytes, pattern, depth, grows=True)
    paths = {who: folder / f"growing-{who}" for who in ("raw", "qcow2x", "qemu")}
    turns = iter(range(1 << 20))

    def time_qemu(aio):
        race.create_qemu(paths["qemu"], SIZE)
        taken = qemu.time(load, paths["qemu"], cache, write=True, aio=aio, depth=depth)
        paths["qemu"].unlink()
        return taken

    aio = qemu.fastest_aio(cache, time_qemu)

    def one_round():
        fd = race.open_raw(paths["raw"], cache, SIZE)
        qcow2x.create(paths["qcow2x"], SIZE)
        with qcow2x.open(paths["qcow2x"], "r+", cache=cache) as image:
            pairs = time_ours_and_raw(load, image, fd, depth, next(turns))
        race.close_raw(fd)
        this = Round.of(RAW, pairs, alike=False)
        this.seconds[QEMU] = time_qemu(aio)
        for who in ("raw", "qcow2x"):
            paths[who].unlink()
        return this

    versus(
        name_of("grow", nbytes, pattern, cache, depth),
        one_round,
        requests=load.count,
        tags=tags_of("grow", nbytes, pattern, cache, depth),
    )
