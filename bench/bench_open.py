"""What it costs to import qcow2x and to open a large image, and how much memory metadata takes."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FEW_ROUNDS
from interpreter import environment

import qcow2x
from qcow2x.demo import race
from qcow2x.demo.race import Load

TIB = 1 << 40
GIB = 1 << 30
MIB = 1 << 20


def import_seconds(statement: str) -> float:
    """How long the statement takes in a fresh interpreter, its start not counted."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return float(printed)


def bench_import(benchmark, fact):
    """All that opening an image needs, not only the name."""
    for statement in ("import qcow2x", "import qcow2x; qcow2x.open"):
        import_seconds(statement)  # compiles what was not used before
        times = [import_seconds(statement) for _ in range(9)]
        middle = statistics.median(times) * 1000
        fact(statement, f"{middle:.1f} ms", "under 50 ms", middle < 50)
    benchmark.pedantic(import_seconds, args=("import qcow2x; qcow2x.open",), rounds=3)


class CountingStorage:
    """A file that notes which reads it was asked for."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDONLY)
        self.reads = []

    def size(self):
        return os.fstat(self.fd).st_size

    def pread(self, length, offset):
        self.reads.append((offset, length))
        return os.pread(self.fd, length, offset)

    def close(self):
        os.close(self.fd)


def bench_open_1_tib(benchmark, folder, fact):
    """Counted by a storage of our own: the header, the L1 table and nothing besides."""
    path = folder / "large.qcow2"
    qcow2x.create(path, TIB)
    with qcow2x.open(path, "r+") as image:
        # A mapping at either end, so that there are tables that might be read.
        image.pwrite(b"x", 0)
        image.pwrite(b"x", TIB - 1)
    storage = CountingStorage(path)
    with qcow2x.open(storage):
        reads = list(storage.reads)
    storage.close()
    fd = os.open(path, os.O_RDONLY)
    l1_bytes = 8 * int.from_bytes(os.pread(fd, 4, 36), "big")
    l1_offset = int.from_bytes(os.pread(fd, 8, 40), "big")

    def is_allowed(offset: int, length: int) -> bool:
        return offset + length <= 65536 or (
            l1_offset <= offset and offset + length <= l1_offset + l1_bytes
        )

    total = sum(length for _, length in reads)
    fact(
        "open 1 TiB: reads",
        f"{len(reads)} reads, {total / 1024:.1f} KiB",
        f"header and L1 ({l1_bytes / 1024:.0f} KiB) alone",
        all(is_allowed(*read) for read in reads),
    )

    ours, baseline = [], []
    for _ in range(200):
        start = time.perf_counter()
        os.pread(fd, 512, 0)
        os.pread(fd, l1_bytes, l1_offset)
        baseline.append(time.perf_counter() - start)
        start = time.perf_counter()
        qcow2x.open(path).close()
        ours.append(time.perf_counter() - start)
    os.close(fd)
    fact(
        "open 1 TiB: time",
        f"{statistics.median(ours) * 1e6:.0f} us",
        f"(reading the same bytes: {statistics.median(baseline) * 1e6:.0f} us) under 1 ms",
        statistics.median(ours) < 1e-3,
    )
    benchmark.pedantic(lambda: qcow2x.open(path).close(), rounds=50)


@pytest.fixture(scope="module")
def mapped(folder):
    """A disk of 256 GiB with an L2 table, and data, in each 512 MiB."""
    path = folder / "mapped.qcow2"
    qcow2x.create(path, 256 * GIB)
    with qcow2x.open(path, "r+") as image:
        for off in range(0, 256 * GIB, 512 * MIB):
            image.pwrite(b"x", off)
    yield path
    path.unlink()


def look_at_all(path: Path, l2_cache_size: int | None):
    """Every slice of its tables is looked at."""
    buffer = bytearray(1)
    with qcow2x.open(path, l2_cache_size=l2_cache_size) as image:
        for off in range(0, 256 * GIB, 32 * MIB):
            image.preadinto(buffer, off)
        return image.stats()


def bench_metadata_memory(benchmark, mapped, fact):
    """Through a cache of 1 MiB, and through the default one, which has room for all of them."""
    small = look_at_all(mapped, MIB)
    fact(
        "256 GiB mapped, l2_cache_size=1 MiB",
        f"{small.l2_cache_bytes / MIB:.1f} MiB, {small.l2_evictions} evictions",
        "at most 1 MiB",
        small.l2_cache_bytes <= MIB,
    )
    default = look_at_all(mapped, None)
    fact(
        "256 GiB mapped, default l2_cache_size",
        f"{default.l2_cache_bytes / MIB:.1f} MiB, {default.l2_evictions} evictions",
        "at most 32 MiB and no eviction",
        default.l2_cache_bytes <= 32 * MIB and default.l2_evictions == 0,
    )
    benchmark.pedantic(look_at_all, args=(mapped, MIB), rounds=3)


def beside_qemu(path: Path, load: Load, l2_cache_size: int) -> Callable[[], dict[str, float]]:
    """Every table was met once before ours are timed; QEMU's cache begins empty each time."""
    options = f"driver=qcow2,file.filename={path},l2-cache-size={l2_cache_size}"
    command = ["qemu-img", "bench", "--image-opts", "-t", "writeback", "-c", str(load.count)]
    command += ["-s", str(load.nbytes), "-S", str(load.step), "-d", "1", options]

    def one_round() -> dict[str, float]:
        with qcow2x.open(path, l2_cache_size=l2_cache_size) as image:
            race.time_image_reads(load, image)
            ours = race.time_image_reads(load, image)
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        match = re.search(r"Run completed in ([\d.]+) seconds", told)
        return {"qcow2x": ours, "qemu-img bench": float(match[1])}

    return one_round


@pytest.mark.parametrize("kib", [256, 1024, 4096, 16384, 32768])
def bench_metadata_cache(versus, mapped, kib):
    """Scattered reads that need all tables in turn, through caches that hold ever more of them (all,
    at 32 MiB), beside QEMU's with as much."""
    load = Load(512, 8192, 256 * GIB, 32 * MIB * 61)
    versus(f"metadata cache of {kib} KiB, 32 MiB of tables", beside_qemu(mapped, load, kib << 10),
           requests=load.count, tags={"work": "metadata cache", "kib": kib})  # fmt: skip


def bench_metadata_of_1_tib(versus, folder, fact):
    """128 MiB of tables through 8 MiB, of a disk whose clusters lie in order."""
    path = folder / "in-order.qcow2"
    qcow2x.create(path, TIB, preallocation="metadata")
    slices = TIB // (32 * MIB)
    buffer = bytearray(1)
    with qcow2x.open(path, l2_cache_size=8 * MIB) as image:
        for off in [*range(0, TIB, 32 * MIB)] * 2:
            if off == 0:
                before = image.stats().l2_loads
            image.preadinto(buffer, off)
        stats = image.stats()
    again = stats.l2_loads - before
    fact(
        "1 TiB filled in order, l2_cache_size=8 MiB, looked at twice",
        f"{stats.l2_cache_bytes / MIB:.1f} MiB, {again} of {slices} tables' parts read again",
        "at most 8 MiB and 1 %",
        stats.l2_cache_bytes <= 8 * MIB and again <= slices / 100,
    )
    load = Load(512, slices, TIB, 32 * MIB * 61)
    versus("metadata cache of 8192 KiB, 128 MiB of tables, filled in order",
           beside_qemu(path, load, 8 * MIB), requests=load.count, rounds=FEW_ROUNDS,
           tags={"work": "metadata cache", "kib": 8192})  # fmt: skip
    path.unlink()
