"""``raw``: the file as the disk, or a window of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from qcow2x.drivers import options as opts
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.filter import FilterNode
from qcow2x.drivers.hooks import HookStorage
from qcow2x.drivers.node import SECTOR
from qcow2x.drivers.options import Options
from qcow2x.drivers.probe import PROBE_BYTES, probe_bytes
from qcow2x.storage import PyStorage
from qcow2x.types import Extent


class RawNode(FilterNode):
    """A window that starts at ``offset`` and is ``size`` bytes long, or goes on to the end of the
    file and can then be resized."""

    driver = "raw"
    is_format = True
    is_filter = False
    strong = ("offset", "size")
    _length: int | None = None

    def open(self, options: Options) -> None:
        self.offset = offset = opts.take_size(options, "offset") or 0
        self._length = size = opts.take_size(options, "size")
        if not offset and size is None:
            self.storage = self.below.storage
            return
        real = self.below.size
        if real < offset:
            raise OptionError(
                f"Offset ({offset}) cannot be greater than size of the containing file ({real})"
            )
        if size is not None and real - offset < size:
            raise OptionError(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the "
                f"actual size of the containing file ({real})"
            )
        if size is not None and size % SECTOR:
            raise OptionError(f"Specified size is not multiple of {SECTOR}")
        self.storage = PyStorage(HookStorage(self), self.writable)

    def _size(self) -> int:
        if self._length is not None:
            return self._length
        return max(0, self.below._size() - self.offset)

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        for run in super()._extents(self.offset + offset, self.offset + end):
            yield run._replace(offset=run.offset - self.offset)

    def _read(self, view: memoryview, offset: int) -> None:
        super()._read(view, self.offset + offset)

    def _write(self, view: memoryview, offset: int, fua: bool) -> None:
        if self._length is not None and offset + len(view) > self._length:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.filename)
        if self.probed and offset < PROBE_BYTES:
            self._refuse_another_format(view, offset)
        super()._write(view, self.offset + offset, fua)

    def _refuse_another_format(self, view: memoryview, offset: int) -> None:
        """A format that was guessed must be guessed again next time: else a guest could have its
        disk opened as an image that names any file of the host."""
        head = bytearray(self.pread(PROBE_BYTES, 0))
        head[offset : offset + len(view)] = view[: PROBE_BYTES - offset]
        if probe_bytes(bytes(head)) != "raw":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), self.filename)

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        super()._zero(self.offset + offset, length, unmap, fua)

    def _discard(self, offset: int, length: int) -> None:
        super()._discard(self.offset + offset, length)

    def _reserve(self, offset: int, length: int) -> None:
        super()._reserve(self.offset + offset, length)

    def _resize(self, size: int, shrink: bool, preallocation: str) -> None:
        if self._length is not None:
            raise OSError(errno.ENOTSUP, "Cannot resize fixed-size raw disks")
        super()._resize(self.offset + size, shrink, preallocation)
