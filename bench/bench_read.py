"""Reads beside os.preadv on a raw file and qemu-img bench: of what is in the page cache, and, apart from
that, from the disk (O_DIRECT). Through a chain of overlays, and of compressed clusters."""

from __future__ import annotations

import os
import random

import pytest
from loads import many_at_once, one_call, side_by_side
from table import KIB, MIB, OURS, QEMU, RAW, Round

import qcow2x
from qcow2x.demo import race
from qcow2x.demo.race import Load

SIZE = 256 * MIB
CHAIN = 50
#: From here on all requests are in one call; a few at a time come from as many threads.
MANY = 32
PACKED = ("half zeros", "dense")
PACKED_SIZE = 64 * MIB


@pytest.fixture(scope="module")
def disks(folder):
    """The same bytes as a raw file and as an image with everything allocated; and compressed clusters, those
    that take the decoder least to do and most."""
    raw, image = folder / "read.raw", folder / "read.qcow2"
    packed = {kind: folder / f"{kind}.qcow2" for kind in PACKED}
    fd = race.open_raw(raw, "writeback", SIZE)
    race.fill(lambda data, off: os.pwritev(fd, [data], off), SIZE)
    os.close(fd)
    qcow2x.convert(raw, image, src_format="raw")
    noise = random.Random(1).randbytes(64 * KIB)
    clusters = {
        "half zeros": bytes(32 * KIB) + noise[: 32 * KIB],
        "dense": bytes(byte & 0x3F for byte in noise),
    }
    for kind in PACKED:
        qcow2x.create(packed[kind], PACKED_SIZE)
        with qcow2x.open(packed[kind], "r+") as opened:
            for off in range(0, PACKED_SIZE, MIB):
                opened.pwrite_compressed(clusters[kind] * 16, off)
    yield raw, image, packed
    for path in (raw, image, *packed.values()):
        path.unlink()


def time_both(load: Load, image: qcow2x.Image, fd: int, depth: int, turn: int):
    if depth == 1:
        return side_by_side(
            load,
            turn,
            lambda part: race.time_image_reads(part, image),
            lambda part: race.time_raw_reads(part, fd),
            stretch=1,
        )
    ours = (
        (lambda part: one_call(part, image.preadv_many, depth))
        if depth >= MANY
        else (lambda part: many_at_once(part, image.preadinto, depth))
    )
    return side_by_side(
        load,
        turn,
        ours,
        lambda part: many_at_once(part, lambda buf, off: os.preadv(fd, [buf], off), depth),
        stretch=16 * depth,
    )


WARM = [
    (4 * KIB, "scattered", 20_000, 1), (4 * KIB, "scattered", 20_000, 2),
    (4 * KIB, "scattered", 20_000, 32), (4 * KIB, "sequential", 20_000, 1),
    (64 * KIB, "scattered", 4_000, 1), (64 * KIB, "scattered", 4_000, 32),
    (MIB, "sequential", 256, 1), (MIB, "sequential", 256, 32),
]  # fmt: skip
COLD = [
    (4 * KIB, "scattered", 500, 1), (4 * KIB, "scattered", 2_000, 32),
    (64 * KIB, "sequential", 500, 1), (64 * KIB, "scattered", 1_000, 32),
    (MIB, "sequential", 128, 1),
]  # fmt: skip


def ids(case):
    nbytes, pattern, _, depth = case
    return f"{nbytes // KIB}k-{pattern}-depth{depth}"


def compare_reads(disks, versus, qemu, case, cache):
    nbytes, pattern, count, depth = case
    raw, path, _ = disks
    load = getattr(Load, pattern)(nbytes, count, SIZE)
    warm = cache == "writeback"
    for disk in (raw, path):
        race.make_warm(disk, readahead=True) if warm else race.make_cold(disk)
    fd = race.open_raw(raw, cache)
    turns = iter(range(1 << 20))
    with qcow2x.open(path, cache=cache) as image:

        def time_qemu(aio):
            return qemu.time(load, path, cache, write=False, aio=aio, depth=depth)

        aio = qemu.fastest_aio(cache, time_qemu)

        def one_round():
            this = Round.of(RAW, time_both(load, image, fd, depth, next(turns)), alike=True)
            this.seconds[QEMU] = time_qemu(aio)
            return this

        size = f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"
        versus(
            f"read {size} {pattern}, {'cached' if warm else 'O_DIRECT'}, depth {depth}",
            one_round,
            requests=load.count,
            tags={"work": "read", "nbytes": nbytes, "pattern": pattern, "warm": warm,
                  "depth": depth, "plot": "read"},
        )  # fmt: skip
    os.close(fd)


@pytest.mark.parametrize("case", WARM, ids=ids)
def bench_read_cached(disks, versus, qemu, case):
    compare_reads(disks, versus, qemu, case, "writeback")


@pytest.mark.parametrize("case", COLD, ids=ids)
@pytest.mark.parametrize("cache", ["none"], indirect=True)
def bench_read_cold(disks, versus, qemu, case, cache):
    compare_reads(disks, versus, qemu, case, cache)


@pytest.mark.parametrize("depth", [2, CHAIN])
def bench_read_through_chain(disks, versus, qemu, folder, depth):
    """Nothing is in the overlays: each read passes through all of their mappings."""
    _, path, _ = disks
    load = Load.scattered(4 * KIB, 20_000, SIZE)
    layers = [folder / f"layer-{n}.qcow2" for n in range(depth - 1)]
    below = path
    for layer in layers:
        qcow2x.create(layer, backing_file=below, backing_format="qcow2")
        below = layer
    race.make_warm(path, readahead=True)
    turns = iter(range(1 << 20))
    with qcow2x.open(below, references="follow") as image, qcow2x.open(path) as alone:

        def one_round():
            pairs = side_by_side(
                load,
                next(turns),
                lambda part: race.time_image_reads(part, image),
                lambda part: race.time_image_reads(part, alone),
                stretch=1,
            )
            this = Round.of("depth 1", pairs, alike=True)
            this.seconds[QEMU] = qemu.time(load, below, "writeback", write=False)
            return this

        versus(
            f"read 4 KiB scattered through a chain of {depth}",
            one_round,
            requests=load.count,
            tags={"work": "chain", "depth": depth, "plot": "read"},
        )
    for layer in layers:
        layer.unlink()


@pytest.mark.parametrize("nbytes", [4 * KIB, 64 * KIB, MIB], ids=["4k", "64k", "1m"])
@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("cache", ["writeback", "none"], indirect=True)
def bench_read_compressed(disks, versus, qemu, cache, kind, nbytes):
    _, _, packed = disks
    path = packed[kind]
    load = Load.sequential(nbytes, PACKED_SIZE // nbytes, PACKED_SIZE)
    race.make_warm(path, readahead=True)

    def one_round():
        if cache == "none":
            race.make_cold(path)
        # The clusters that were decoded last are an image's own.
        with qcow2x.open(path, cache=cache) as image:
            ours = race.time_image_reads(load, image)
        return {OURS: ours, QEMU: qemu.time(load, path, cache, write=False)}

    versus(
        f"read {nbytes // KIB} KiB sequential, {cache}, compressed clusters ({kind})",
        one_round,
        requests=load.count,
        tags={"work": "read compressed", "plot": "read" if cache == "writeback" else None},
    )
