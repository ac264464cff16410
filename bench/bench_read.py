"""Reads of what is in the page cache, beside os.preadv on a raw file and qemu-img bench."""

from __future__ import annotations

import os

import pytest

import qcow2x
from qcow2x.demo import race
from qcow2x.demo.race import Load

SIZE = 256 << 20


@pytest.fixture(scope="module")
def disks(folder):
    """The same bytes as a raw file, as an image with everything allocated and compressed."""
    raw, image, packed = folder / "read.raw", folder / "read.qcow2", folder / "packed.qcow2"
    fd = race.open_raw(raw, "writeback", SIZE)
    race.fill(lambda data, off: os.pwritev(fd, [data], off), SIZE)
    os.close(fd)
    qcow2x.convert(raw, image, src_format="raw")
    half_zero = bytes(32768) + race.Load.sequential(65536, 1, 65536).buffers[0][:32768].tobytes()
    qcow2x.create(packed, SIZE)
    with qcow2x.open(packed, "r+") as opened:
        for off in range(0, SIZE, 1 << 20):
            opened.pwrite_compressed(half_zero * 16, off)
    for path in (raw, image, packed):
        race.make_warm(path, readahead=True)
    yield raw, image, packed
    for path in (raw, image, packed):
        path.unlink()


@pytest.mark.parametrize(
    ("name", "load", "target"),
    [
        ("read 4 KiB, scattered", Load.scattered(4096, 30_000, SIZE), 0.85),
        ("read 64 KiB, scattered", Load.scattered(65536, 4_000, SIZE), None),
        ("read 1 MiB, sequential", Load.sequential(1 << 20, 512, SIZE), 0.97),
    ],
)
def bench_cached_read(disks, versus, name, load, target):
    raw, path, _ = disks
    fd = os.open(raw, os.O_RDONLY)
    try:
        with qcow2x.open(path) as image:

            def one_round():
                ours, theirs = race.alternate(
                    load,
                    lambda part: race.time_image_reads(part, image),
                    lambda part: race.time_raw_reads(part, fd),
                )
                qemu = race.time_qemu(load, path, "writeback", write=False)
                return {"qcow2x": ours, "os.preadv": theirs, "qemu-img bench": qemu}

            versus(
                name,
                one_round,
                requests=load.count,
                targets={"os.preadv": target} if target else {},
            )
    finally:
        os.close(fd)


def bench_read_through_overlay(disks, versus, folder):
    """Nothing is in the overlay: each read passes through its mapping to the image below."""
    _, path, _ = disks
    load = Load.scattered(4096, 30_000, SIZE)
    overlay = folder / "read-overlay.qcow2"
    qcow2x.create(overlay, backing_file=path, backing_format="qcow2")
    with qcow2x.open(overlay, references="follow") as image, qcow2x.open(path) as below:

        def one_round():
            ours, alone = race.alternate(
                load,
                lambda part: race.time_image_reads(part, image),
                lambda part: race.time_image_reads(part, below),
            )
            qemu = race.time_qemu(load, overlay, "writeback", write=False)
            return {"qcow2x": ours, "the image below": alone, "qemu-img bench": qemu}

        versus("read 4 KiB through an empty overlay", one_round, requests=load.count)
    overlay.unlink()


def bench_read_compressed(disks, versus):
    _, _, path = disks
    load = Load.sequential(65536, 1_000, SIZE)
    with qcow2x.open(path) as image:

        def one_round():
            ours = race.time_image_reads(load, image)
            qemu = race.time_qemu(load, path, "writeback", write=False)
            return {"qcow2x": ours, "qemu-img bench": qemu}

        versus("read 64 KiB compressed clusters", one_round, requests=load.count)
