"""``raw``: the file as the disk, or a window of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

from qcow2x.drivers import options as opts
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.node import SECTOR, Node
from qcow2x.drivers.options import Options
from qcow2x.drivers.probe import PROBE_BYTES, probe_bytes
from qcow2x.storage import PyStorage, Storage
from qcow2x.types import Extent


class RawNode(Node):
    driver = "raw"
    is_format = True
    strong = ("offset", "size")

    def open(self, options: Options) -> None:
        offset = opts.take_size(options, "offset") or 0
        size = opts.take_size(options, "size")
        self.offset = offset
        file = self.children["file"]
        if not offset and size is None:
            self.storage = file.storage
            return
        real = file.size
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
        window = _Window(file.storage, offset, size)
        self.storage = PyStorage(window, self.writable)

    def _write(self, view: memoryview, offset: int, fua: bool) -> None:
        if self.probed and offset < PROBE_BYTES:
            self._refuse_another_format(view, offset)
        super()._write(view, offset, fua)

    def _refuse_another_format(self, view: memoryview, offset: int) -> None:
        """A format that was guessed must be guessed again next time: else a guest could have its
        disk opened as an image that names any file of the host."""
        head = bytearray(self.pread(PROBE_BYTES, 0))
        head[offset : offset + len(view)] = view[: PROBE_BYTES - offset]
        if probe_bytes(bytes(head)) != "raw":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), self.filename)

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        file = self.children["file"]
        for run in file._extents(self.offset + offset, self.offset + end):
            yield run._replace(offset=run.offset - self.offset)


class _Window:
    """A part of another storage, which starts at ``offset`` and is ``length`` bytes long, or goes
    on to the end and can then be resized."""

    def __init__(self, below: Storage, offset: int, length: int | None) -> None:
        self.name = below.name
        self._below = below
        self._offset = offset
        self._length = length

    def size(self) -> int:
        if self._length is not None:
            return self._length
        return max(0, self._below.size() - self._offset)

    def pread(self, length: int, offset: int) -> bytes:
        count = max(0, min(length, self.size() - offset))
        return self._below.pread(count, self._offset + offset)

    def preadinto(self, buffer: Any, offset: int) -> int:
        count = max(0, min(len(buffer), self.size() - offset))
        return self._below.preadinto(buffer[:count], self._offset + offset)

    def pwrite(self, data: Any, offset: int) -> int:
        if self._length is not None and offset + len(data) > self._length:
            raise OSError(28, f"{self.name}: write past the end of its window")
        return self._below.pwrite(data, self._offset + offset)

    def flush(self) -> None:
        self._below.flush()

    def truncate(self, size: int) -> None:
        if self._length is not None:
            raise OSError(95, "Cannot resize fixed-size raw disks")
        self._below.truncate(self._offset + size)

    def punch(self, offset: int, length: int) -> None:
        self._below.punch(self._offset + offset, length)
