"""``null-co``: a disk that keeps nothing. Reads give zeros."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from qcow2x.drivers import options as opts
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.node import Node
from qcow2x.drivers.options import Options
from qcow2x.storage import PyStorage
from qcow2x.types import Extent

_DEFAULT_SIZE = 1 << 30


class NullNode(Node):
    driver = "null-co"
    is_protocol = True
    strong = ("size", "read-zeroes")

    @classmethod
    def parse_filename(cls, filename: str, options: Options) -> None:
        if filename != "null-co://":
            raise OptionError("The only allowed filename for this driver is 'null-co://'")

    def open(self, options: Options) -> None:
        # A file name says nothing here, yet QEMU takes it.
        opts.take_text(options, "filename")
        size = opts.take_size(options, "size")
        latency_ns = opts.take_number(options, "latency-ns") or 0
        self.read_zeroes = opts.take_bool(options, "read-zeroes")
        if latency_ns > (1 << 63) - 1:
            raise OptionError("latency-ns is invalid")
        nothing = _Nothing(_DEFAULT_SIZE if size is None else size, latency_ns)
        self.storage = PyStorage(nothing, self.writable)
        self._nothing = nothing

    def own_filename(self) -> str | None:
        return "" if any(key in self.options for key in self.strong) else "null-co://"

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        zero = self.read_zeroes
        if offset < end:
            yield Extent(offset, end - offset, True, zero, False, 0, offset, self.filename)

    def _read(self, view: memoryview, offset: int) -> None:
        from qcow2x._core.bulk import fill_zero

        self._nothing.wait()
        fill_zero(view)

    def _write(self, view: memoryview, offset: int, fua: bool) -> None:
        self._nothing.wait()

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        self._nothing.wait()

    def _discard(self, offset: int, length: int) -> None:
        self._nothing.wait()


class _Nothing:
    """The storage of a null node, for what stands on it."""

    name = "null-co://"

    def __init__(self, size: int, latency_ns: int) -> None:
        self._size = size
        self._latency = latency_ns / 1e9

    def wait(self) -> None:
        if self._latency:
            time.sleep(self._latency)

    def size(self) -> int:
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        self.wait()
        return bytes(max(0, min(length, self._size - offset)))

    def preadinto(self, buffer: Any, offset: int) -> int:
        from qcow2x._core.bulk import fill_zero

        self.wait()
        count = max(0, min(len(buffer), self._size - offset))
        fill_zero(buffer[:count])
        return count

    def pwrite(self, data: Any, offset: int) -> int:
        self.wait()
        return len(data)

    def flush(self) -> None:
        self.wait()

    def punch(self, offset: int, length: int) -> None:
        self.wait()

    def truncate(self, size: int) -> None:
        raise OSError(95, "Image format driver does not support resize")
