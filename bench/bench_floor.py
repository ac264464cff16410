"""What the disk itself leaves to gain: 64 KiB that grow a file durably, one after another.

Growing ahead of the writer, qcow2x writes each byte twice, zeros in long runs and then the data over them, and saves the
commits of the host's journal that a growing raw file waits for. Which of the two costs more is the disk's doing.
Here both are done to raw files, with no image in between: an image that grows like this can do no better."""

from __future__ import annotations

import os
import statistics
import time

import pytest
from conftest import ROUNDS
from table import KIB, MIB

from qcow2x.demo import race
from qcow2x.demo.race import Load

SIZE = 256 * MIB
#: As much at a time as qcow2x writes ahead of who writes on and on (MOST_BYTES of _core/reserve.pxd).
AHEAD = 8 * MIB
LOAD = Load.sequential(64 * KIB, 4 * AHEAD // (64 * KIB), SIZE)
STRETCH = 32


def write_zeros(fd: int, end: int) -> float:
    start = time.perf_counter()
    for at in range(end - AHEAD, end, 2 * MIB):
        os.pwritev(fd, [race.zeros(2 * MIB)], at)
    os.fdatasync(fd)
    return time.perf_counter() - start


@pytest.mark.parametrize("cache", ["writethrough", "directsync"], indirect=True)
def bench_floor(benchmark, folder, fact, cache):
    paths = [folder / name for name in ("growing", "ahead")]
    took: dict[str, list[float]] = {"growing": [], "zeros": [], "rewriting": []}

    def one_round():
        growing, ahead = (race.open_raw(path, cache, SIZE) for path in paths)
        # Past the page cache in every mode, each as durable as the sync after it.
        unsynced = race.open_raw(paths[1], "none")
        this = dict.fromkeys(took, 0.0)
        for part in LOAD.parts(LOAD.count // STRETCH):
            if part.offsets[0] % AHEAD == 0:
                this["zeros"] += write_zeros(unsynced, part.offsets[0] + AHEAD)
            this["growing"] += race.time_raw_writes(part, growing)
            this["rewriting"] += race.time_raw_writes(part, ahead)
        for fd in (growing, ahead, unsynced):
            race.close_raw(fd)
        for path in paths:
            path.unlink()
        for what, seconds in this.items():
            took[what].append(seconds / LOAD.count * 1e6)

    benchmark.pedantic(one_round, rounds=3 * ROUNDS)
    each = {what: statistics.median(times) for what, times in took.items()}
    ratio = (each["zeros"] + each["rewriting"]) / each["growing"]
    fact(
        f"grow 64 KiB sequential, {cache}, depth 1: what the disk allows",
        f"{ratio:.3f} of raw",
        f"(zeros {each['zeros']:.0f} us and rewriting {each['rewriting']:.0f}; raw {each['growing']:.0f})",
        None,
    )
