"""``bench``: time a series of equal requests."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from qcow2x.cli.copying import why
from qcow2x.cli.opening import open_disk
from qcow2x.cli.options import (
    FORMAT,
    IMAGE_OPTS,
    QUIET,
    SHARE,
    Option,
    Parsed,
    image_size,
    one_file,
    parse,
)
from qcow2x.cli.report import CommandError
from qcow2x.errors import Qcow2Error

OPTIONS = (
    Option("c", "count", "N", "number of requests (75000)"),
    Option("d", "depth", "N", "requests in flight (64); more than one matters for uncached modes"),
    FORMAT,
    Option("", "flush-interval", "N", "flush after every N writes"),
    Option(
        "i", "aio", "MODE", "threads, native (uncached modes only) or io_uring: no difference here"
    ),
    Option("n", "native", None, "the same as -i native"),
    Option("", "no-drain", None, "do not wait for the writes in flight before a flush"),
    Option("o", "offset", "OFFSET", "where the first request begins (0)"),
    Option("", "pattern", "BYTE", "byte that the writes are made of (0)"),
    QUIET,
    Option("s", "buffer-size", "SIZE", "bytes of one request (4k)"),
    Option("S", "step-size", "SIZE", "distance between two requests (the request's size)"),
    Option("t", "cache", "MODE", "cache mode (writeback)"),
    Option("w", "write", None, "write instead of reading"),
    SHARE,
    IMAGE_OPTS,
)
USAGE = (
    "[-c N] [-d N] [-f FMT] [--flush-interval=N] [-i MODE] [-n] [--no-drain] [-o OFFSET] "
    "[--pattern=BYTE] [-q] [-s SIZE] [-S SIZE] [-t MODE] [-w] [-U] [--image-opts] FILE"
)
OPERANDS = (("FILE", "the image; with -w it is written to"),)
INT_MAX = (1 << 31) - 1
#: With the page cache a request is answered at once, and a second thread would only wait for the
#: first; past it the device works on several. More threads than this no longer add to that.
MAX_THREADS = 32


def main(argv: list[str]) -> int:
    from qcow2x.drivers.opening import CACHE_FLAGS

    parsed = parse("bench", USAGE, OPTIONS, argv, OPERANDS)
    count = _number(parsed, "count", "request count", INT_MAX, 75000)
    depth = _number(parsed, "depth", "queue depth", INT_MAX, 64)
    interval = _number(parsed, "flush-interval", "flush interval", INT_MAX, 0)
    pattern = _number(parsed, "pattern", "pattern byte", 255, 0)
    offset = image_size(parsed.value("offset") or "0", "offset")
    nbytes = image_size(parsed.value("buffer-size") or "4k", "buffer size", 0, INT_MAX)
    step = image_size(parsed.value("step-size") or "0", "step_size", 0, INT_MAX) or nbytes
    is_write = parsed.flag("write")
    cache = parsed.value("cache", "writeback") or ""
    if cache not in CACHE_FLAGS:
        raise CommandError("Invalid cache mode")
    aio = parsed.value("aio", "threads") or ""
    if aio not in ("threads", "native", "io_uring"):
        raise CommandError(f"Invalid aio option: {aio}")
    if parsed.flag("native"):
        aio = "native"
    path = one_file(parsed)
    if interval and not is_write:
        raise CommandError("--flush-interval is only available in write tests")
    if interval and interval < depth:
        raise CommandError("Flush interval can't be smaller than depth")
    with open_disk(
        path,
        parsed.value("format"),
        image_opts=parsed.flag("image-opts"),
        writable=is_write,
        cache=cache,
        force_share=parsed.flag("force-share"),
        discard=False,
        aio=aio,
    ) as disk:
        kind = "write" if is_write else "read"
        print(
            f"Sending {count} {kind} requests, {nbytes} bytes each, {depth} in parallel "
            f"(starting at offset {offset}, step size {step})"
        )
        if interval:
            print(f"Sending flush every {interval} requests")
        threads = 1 if cache in ("writeback", "unsafe") else max(1, min(depth, MAX_THREADS))
        run = _Run(disk, count, nbytes, offset, step, is_write, pattern, interval)
        try:
            seconds = run.time(threads)
        except (OSError, Qcow2Error) as exc:
            raise CommandError(f"Failed request: {why(exc)}") from exc
        print(f"Run completed in {seconds:.3f} seconds.")
    return 0


def _number(parsed: Parsed, key: str, what: str, high: int, default: int) -> int:
    text = parsed.value(key)
    if text is None:
        return default
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= high:
        raise CommandError(f"Invalid {what} specified")
    return value


class _Run:
    """The series of requests, shared out among threads in order."""

    def __init__(
        self,
        disk: Any,
        count: int,
        nbytes: int,
        offset: int,
        step: int,
        is_write: bool,
        pattern: int,
        interval: int,
    ) -> None:
        self.disk = disk
        self.nbytes = nbytes
        self.is_write = is_write
        self.pattern = pattern
        self.interval = interval
        self.offsets = self._walk(count, offset, step, disk.size)
        self.lock = threading.Lock()
        self.sent = 0
        self.failure: BaseException | None = None

    def _walk(self, count: int, offset: int, step: int, size: int) -> Iterator[int]:
        for _ in range(count):
            if offset + self.nbytes > size:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            yield offset
            offset = (offset + step) % size if size else 0

    def time(self, n_threads: int) -> float:
        """Seconds from the first request to the last answer; what a close flushes is not in it."""
        started = time.perf_counter()
        if n_threads == 1:
            self._send(self.offsets)
        else:
            threads = [threading.Thread(target=self._worker) for _ in range(n_threads)]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            except BaseException as exc:
                self.failure = exc
                raise
            if self.failure is not None:
                raise self.failure
        return time.perf_counter() - started

    def _worker(self) -> None:
        try:
            self._send(self._shared_offsets())
        except BaseException as exc:
            self.failure = exc

    def _shared_offsets(self) -> Iterator[int]:
        while self.failure is None:
            with self.lock:
                offset = next(self.offsets, None)
            if offset is None:
                return
            yield offset

    def _send(self, offsets: Iterator[int]) -> None:
        # A map is page aligned, as O_DIRECT wants it.
        buffer = memoryview(mmap.mmap(-1, max(self.nbytes, 1)))[: self.nbytes]
        if not self.is_write:
            read = self.disk.preadinto
            for offset in offsets:
                read(buffer, offset)
            return
        buffer[:] = bytes([self.pattern]) * self.nbytes
        write = self.disk.pwrite
        if not self.interval:
            for offset in offsets:
                write(buffer, offset)
            return
        for offset in offsets:
            write(buffer, offset)
            with self.lock:
                self.sent += 1
                due = self.sent % self.interval == 0
            if due:
                self.disk.flush()
