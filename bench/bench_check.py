"""Checking and mapping a large image beside qemu-img, and the memory that the largest take.

The image's metadata is preallocated: 16 million clusters at 1 TiB, all of them referred to.
QCOW2X_BENCH_SIZE sets another size in GiB. The largest image that ext4 can hold takes minutes and
3 GiB of disk to make: QCOW2X_BENCH_HUGE=1 asks for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FEW_ROUNDS

import qcow2x

SIZE_GIB = int(os.environ.get("QCOW2X_BENCH_SIZE", "1024"))
HUGE = (16 << 40) - (4 << 30)

# Not getrusage(): that begins with the size of the process this one was forked from.
CHECK_AND_TELL = """
import sys, qcow2x
assert qcow2x.check(sys.argv[1]).clean
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) // 1024)
"""


def peak_mib(path: Path) -> int:
    """Memory of a whole process that checks the image, the interpreter included."""
    parent = str(Path(qcow2x.__file__).resolve().parent.parent)
    return int(
        subprocess.run(
            [sys.executable, "-c", CHECK_AND_TELL, str(path)],
            env={**os.environ, "PYTHONPATH": parent},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
    )


@pytest.fixture(scope="module")
def large(folder):
    path = folder / "large.qcow2"
    qcow2x.create(path, SIZE_GIB << 30, preallocation="metadata")
    yield path
    path.unlink()


def bench_check(versus, large):
    """The same counts come out of both; both read from the page cache."""

    def one_round() -> dict[str, float]:
        start = time.perf_counter()
        assert qcow2x.check(large).clean
        between = time.perf_counter()
        subprocess.run(["qemu-img", "check", large], check=True, stdout=subprocess.DEVNULL)
        return {"qcow2x": between - start, "qemu-img": time.perf_counter() - between}

    versus(
        f"check, {SIZE_GIB} GiB",
        one_round,
        tags={"work": "check", "plot": "image"},
        rounds=FEW_ROUNDS,
    )


def bench_map(versus, large):
    """What is where, all of it: 16 million clusters at 1 TiB."""

    def one_round() -> dict[str, float]:
        start = time.perf_counter()
        with qcow2x.open(large) as image:
            assert sum(extent.length for extent in image.extents()) == SIZE_GIB << 30
        between = time.perf_counter()
        command = ["qemu-img", "map", "--output=json", large]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {"qcow2x": between - start, "qemu-img": time.perf_counter() - between}

    versus(
        f"map, {SIZE_GIB} GiB",
        one_round,
        tags={"work": "map", "plot": "image"},
        at_most={"qemu-img": 1.0},
        rounds=FEW_ROUNDS,
    )


def bench_check_memory(benchmark, large, fact):
    peaks = []
    benchmark.pedantic(lambda: peaks.append(peak_mib(large)), rounds=1)
    fact(f"check, {SIZE_GIB} GiB: peak memory", f"{peaks[0]} MiB", "under 128 MiB", peaks[0] < 128)


@pytest.mark.skipif(
    "QCOW2X_BENCH_HUGE" not in os.environ, reason="takes minutes: asked for by name"
)
def bench_check_memory_16_tib(benchmark, folder, fact):
    path = folder / "huge.qcow2"
    qcow2x.create(path, HUGE, preallocation="metadata")
    peaks = []
    benchmark.pedantic(lambda: peaks.append(peak_mib(path)), rounds=1)
    path.unlink()
    fact("check, 16 TiB: peak memory", f"{peaks[0]} MiB", "under 128 MiB", peaks[0] < 128)
