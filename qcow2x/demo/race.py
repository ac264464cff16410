"""The same requests on a raw file, on qcow2x and on QEMU, timed alike.

A :class:`Load` says which requests. Each ``time_*`` function sends them one at a time, synchronously,
to a disk that is there already, and returns the seconds from the first to the last; opening and
closing are not in it. ``qemu-img bench`` can only walk in steps, so everybody walks in steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import mmap
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import qcow2x
from qcow2x.demo.programs import DemoFailure, run

PAGE = 4096

#: How a raw file is opened to be as durable as each cache mode says.
RAW_FLAGS = {
    "writeback": 0,
    "none": os.O_DIRECT,
    "writethrough": os.O_DSYNC,
    "directsync": os.O_DIRECT | os.O_DSYNC,
}

#: Different buffers that the requests take turns with, so that a misplaced one shows.
_VARIANTS = 61
_HUGE_PAGE = 2 << 20

#: Asks the C library for them, which has them for what lies far inside a heap only.
HUGE_PAGES = ("GLIBC_TUNABLES=glibc.malloc.hugetlb=1",)
AIO_WAYS = ("threads", "native", "io_uring")

#: Into how many stretches :func:`alternate` cuts a load.
STRETCHES = 32


@dataclass(frozen=True)
class Load:
    """``count`` requests of ``nbytes``, each ``step`` bytes after the last, on a disk of ``size``
    bytes; behind its end the walk goes on from its start."""

    nbytes: int
    count: int
    size: int
    step: int
    #: Which request of the walk is the first.
    first: int = 0
    #: Where the disk begins in its file.
    base: int = 0

    @classmethod
    def sequential(cls, nbytes: int, count: int, size: int) -> Load:
        return cls(nbytes, count, size, nbytes)

    @classmethod
    def scattered(cls, nbytes: int, count: int, size: int) -> Load:
        """Far apart and all over the disk, each place once before any comes again."""
        places = size // nbytes
        # Steps of the golden section spread evenly however many there are.
        step = int(places * (math.sqrt(5) - 1) / 2)
        while math.gcd(step, places) != 1:
            step += 1
        return cls(nbytes, count, size, step * nbytes)

    def parts(self, n: int) -> list[Load]:
        """The same requests in *n* loads, one after the other."""
        n = min(n, self.count)
        edges = [self.count * i // n for i in range(n + 1)]
        return [
            replace(self, first=self.first + low, count=high - low)
            for low, high in zip(edges, edges[1:], strict=False)
        ]

    @cached_property
    def offsets(self) -> list[int]:
        return [
            self.base + i * self.step % self.size
            for i in range(self.first, self.first + self.count)
        ]

    @cached_property
    def buffers(self) -> list[memoryview]:
        """One page-aligned buffer per request, out of a few that take turns."""
        variants = _variants(self.nbytes)
        return [variants[i % _VARIANTS] for i in range(self.first, self.first + self.count)]


@cache
def _variants(nbytes: int) -> list[memoryview]:
    pool = _huge_pages(nbytes + (_VARIANTS - 1) * PAGE)
    pool[:] = random.Random(nbytes).randbytes(len(pool))
    return [pool[i * PAGE : i * PAGE + nbytes] for i in range(_VARIANTS)]


@cache
def zeros(nbytes: int) -> memoryview:
    """Zeros to write, past the page cache too."""
    return _huge_pages(nbytes)


@cache
def _read_buffer(nbytes: int) -> memoryview:
    return _huge_pages(nbytes)


def _huge_pages(nbytes: int) -> memoryview:
    """Memory as that of a guest, whose pages lie side by side. In pages of 4 KiB that lie anywhere a
    device takes 1 MiB in two pieces (virtio's 254 segments), which is half as fast: whose memory
    happens to be better would win."""
    whole = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
    memory = mmap.mmap(-1, whole + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        # A kernel without them says so.
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _HUGE_PAGE
    return view[start : start + nbytes]


def alternate(
    load: Load, *runs: Callable[[Load], float], stretches: int = STRETCHES
) -> list[float]:
    """Several subjects under the same load, a short stretch each in turn; the seconds of each.

    The neighbours on a machine come and go within a second: what slows one subject down then
    slows the others as well.
    """
    seconds = [0.0] * len(runs)
    for n, part in enumerate(load.parts(stretches)):
        for k in range(len(runs)):
            # Who goes first changes.
            i = (n + k) % len(runs)
            seconds[i] += runs[i](part)
    return seconds


def time_raw_writes(load: Load, fd: int) -> float:
    requests = [([buffer], off) for buffer, off in zip(load.buffers, load.offsets, strict=True)]
    write = os.pwritev
    start = time.perf_counter()
    for parts, off in requests:
        write(fd, parts, off)
    return time.perf_counter() - start


def time_image_writes(load: Load, image: qcow2x.Image) -> float:
    requests = list(zip(load.buffers, load.offsets, strict=True))
    write = image.pwrite
    start = time.perf_counter()
    for buffer, off in requests:
        write(buffer, off)
    return time.perf_counter() - start


def time_raw_reads(load: Load, fd: int) -> float:
    buffer = _read_buffer(load.nbytes)
    parts = [buffer]
    offsets = load.offsets
    read = os.preadv
    start = time.perf_counter()
    for off in offsets:
        read(fd, parts, off)
    return time.perf_counter() - start


def time_image_reads(load: Load, image: qcow2x.Image) -> float:
    buffer = _read_buffer(load.nbytes)
    offsets = load.offsets
    read = image.preadinto
    start = time.perf_counter()
    for off in offsets:
        read(buffer, off)
    return time.perf_counter() - start


def time_qemu(
    load: Load,
    path: Path,
    cache: str,
    *,
    write: bool,
    aio: str = "threads",
    depth: int = 1,
    environment: Sequence[str] = HUGE_PAGES,
) -> float:
    """The same requests by ``qemu-img bench``, which tells its time to the millisecond; *depth* of
    them at once. Out of huge pages where it can be had so, as ours are (``_huge_pages``)."""
    printed = run(
        "env", *environment,
        "qemu-img", "bench", *(["-w"] if write else []), "-t", cache, "-i", aio, "-f", "qcow2",
        "-d", str(depth), "-c", str(load.count), "-s", str(load.nbytes), "-S", str(load.step), path,
    )  # fmt: skip
    match = re.search(r"Run completed in ([\d.]+) seconds", printed)
    if match is None:
        raise DemoFailure(f"qemu-img bench printed no time:\n{printed}")
    return max(float(match[1]), 0.0005)


def fastest_qemu_aio(folder: Path, cache: str) -> str:
    """The way of sending requests that serves QEMU best here, so that it runs at its best."""
    path = folder / "qemu-aio.qcow2"
    load = Load.sequential(65536, 256, 16 << 20)
    times: dict[str, float] = {}
    for aio in AIO_WAYS:
        if aio == "native" and not RAW_FLAGS[cache] & os.O_DIRECT:
            continue
        try:
            create_qemu(path, load.size)
            time_qemu(load, path, cache, write=True, aio=aio)
            times[aio] = time_qemu(load, path, cache, write=True, aio=aio)
        except DemoFailure:
            # Not built in, or the kernel refuses it: QEMU goes without.
            continue
        finally:
            path.unlink(missing_ok=True)
    if not times:
        raise DemoFailure(f"qemu-img bench -t {cache} does not run in {folder}")
    return min(times, key=lambda aio: times[aio])


def create_qemu(path: Path, size: int) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))


def open_raw(path: Path, cache: str, size: int | None = None) -> int:
    """A raw disk opened for writing; with *size* a new, sparse one of that many bytes."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | RAW_FLAGS[cache], 0o644)
    if size is not None:
        os.ftruncate(fd, size)
    return fd


def close_raw(fd: int) -> None:
    """Closes a raw disk as an image is closed: durably, so that its dirty pages are not written
    out during the next one's time."""
    os.fdatasync(fd)
    os.close(fd)


def takes_direct(folder: Path) -> bool:
    """Whether files in *folder* can be read and written past the page cache."""
    path = folder / "direct-io"
    try:
        fd = open_raw(path, "none", PAGE)
        try:
            os.pwritev(fd, [mmap.mmap(-1, PAGE)], 0)
        finally:
            os.close(fd)
        return True
    except OSError as exc:
        if exc.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    finally:
        path.unlink(missing_ok=True)


def fill(write: Callable[[memoryview, int], object], size: int) -> None:
    """Writes every byte of a disk, in pieces of a cluster as a guest's installer might."""
    load = Load.sequential(65536, size // 65536, size)
    for buffer, off in zip(load.buffers, load.offsets, strict=True):
        write(buffer, off)


def make_cold(path: Path) -> None:
    """Everything on the disk, nothing in the page cache: where O_DIRECT should start from."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def make_warm(path: Path, *, readahead: bool = False) -> None:
    """All of the file in the page cache, in the same way for everybody.

    How its pages came there decides what a write to them costs: the kernel keeps large folios
    where large writes or readahead made them, and changing 4 KiB of one takes several times as
    long. Read in without readahead, each page stands alone, whoever wrote the file. For reads
    large folios are the natural state, and the fast one.
    """
    make_cold(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not readahead:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        buffer = bytearray(1 << 20)
        off = 0
        while n := os.preadv(fd, [buffer], off):
            off += n
    finally:
        os.close(fd)
