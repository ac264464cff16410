"""``qcow2x bench``: time a series of equal requests, as ``qemu-img bench`` does."""

from __future__ import annotations

import mmap
import threading
import time
from typing import Any

from qcow2x.cli.options import (
    FORMAT,
    QUIET,
    SHARE,
    Option,
    UsageError,
    image_size,
    number,
    one_file,
    parse,
)

OPTIONS = (
    Option("c", "count", "N", "number of requests (75000)"),
    Option("d", "depth", "N", "requests in flight (64); more than one matters for uncached modes"),
    FORMAT,
    Option("", "flush-interval", "N", "flush after every N writes"),
    Option("i", "aio", "MODE", "accepted for qemu-img, without effect"),
    Option("n", "native", None, "accepted for qemu-img, without effect"),
    Option("", "no-drain", None, "do not wait for the writes in flight before a flush"),
    Option("o", "offset", "OFFSET", "where the first request begins (0)"),
    Option("", "pattern", "BYTE", "byte that the writes are made of (0)"),
    QUIET,
    Option("s", "buffer-size", "SIZE", "bytes of one request (4k)"),
    Option("S", "step-size", "SIZE", "distance between two requests (the request's size)"),
    Option("t", "cache", "MODE", "cache mode (writeback)"),
    Option("w", "write", None, "write instead of reading"),
    SHARE,
)
USAGE = (
    "[-c N] [-d N] [-f FMT] [--flush-interval=N] [-n] [-o OFFSET] [--pattern=BYTE] [-q] "
    "[-s SIZE] [-S SIZE] [-t MODE] [-w] [-U] FILE"
)
#: With the page cache a request is answered at once, and a second thread would only wait for the
#: first; past it the device works on several. More threads than this no longer add to that.
MAX_THREADS = 32


def main(argv: list[str]) -> int:
    parsed = parse("bench", USAGE, OPTIONS, argv)
    path = one_file(parsed)
    int_max = (1 << 31) - 1
    count = number(parsed.value("count"), "request count", 1, int_max, 75000)
    depth = number(parsed.value("depth"), "queue depth", 1, int_max, 64)
    interval = number(parsed.value("flush-interval"), "flush interval", 0, int_max, 0)
    pattern = number(parsed.value("pattern"), "pattern byte", 0, 255, 0)
    offset = image_size(parsed.value("offset") or "0", "offset")
    nbytes = _bounded(parsed.value("buffer-size") or "4k", "buffer size", int_max)
    step = _bounded(parsed.value("step-size") or "0", "step size", int_max) or nbytes
    is_write = parsed.flag("write")
    cache = parsed.value("cache", "writeback") or ""
    if interval and not is_write:
        raise UsageError("--flush-interval is only available in write tests")
    if interval and interval < depth:
        raise UsageError("Flush interval can't be smaller than depth")

    from qcow2x.ops.disk import open_disk

    disk, _ = open_disk(
        path,
        parsed.value("format"),
        mode="r+" if is_write else "r",
        cache=cache,
        references="follow",
        lock=not parsed.flag("force-share"),
    )
    try:
        kind = "write" if is_write else "read"
        if not parsed.flag("quiet"):
            print(
                f"Sending {count} {kind} requests, {nbytes} bytes each, {depth} in parallel "
                f"(starting at offset {offset}, step size {step})"
            )
            if interval:
                drain = "" if parsed.flag("no-drain") else ", waiting for those in flight"
                print(f"Sending flush every {interval} requests{drain}")
        threads = 1 if cache in ("writeback", "unsafe") else min(depth, MAX_THREADS)
        run = _Run(disk, count, nbytes, offset, step, is_write, pattern, interval)
        seconds = run.time(threads)
        print(f"Run completed in {seconds:.3f} seconds.")
    finally:
        disk.close()
    return 0


def _bounded(text: str, what: str, high: int) -> int:
    value = image_size(text, what)
    if value > high:
        raise UsageError(f"Invalid {what} specified. Must be between 0 and {high}.")
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
        size = disk.size
        if nbytes > size or offset > size - nbytes:
            raise ValueError(f"Failed request: {nbytes} bytes at {offset} do not fit in the disk")
        # Behind the last whole request the series begins again at the start of the disk.
        self.offsets = self._walk(count, offset, step, size)
        self.lock = threading.Lock()
        self.sent = 0
        self.failure: BaseException | None = None

    def _walk(self, count: int, offset: int, step: int, size: int) -> Any:
        for _ in range(count):
            yield offset
            offset += step
            if offset > size - self.nbytes:
                offset = 0

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

    def _shared_offsets(self) -> Any:
        while self.failure is None:
            with self.lock:
                offset = next(self.offsets, None)
            if offset is None:
                return
            yield offset

    def _send(self, offsets: Any) -> None:
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
