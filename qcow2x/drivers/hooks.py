"""A node's hooks as a Python storage, for drivers that are written in Python."""

from __future__ import annotations

from typing import Any

from qcow2x.drivers.node import Node


class HookStorage:
    """What a parent stacks on where a driver does its own reading and writing: give it to
    :class:`qcow2x.storage.PyStorage`. The parent may write past the end, as it makes a file grow."""

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def name(self) -> str:
        return self._node.filename

    @property
    def fixed_size(self) -> bool:
        return self._node.fixed_size

    def size(self) -> int:
        return self._node._size()

    def pread(self, length: int, offset: int) -> bytes:
        data = bytearray(max(0, min(length, self.size() - offset)))
        if data:
            self._node._read(memoryview(data), offset)
        return bytes(data)

    def preadinto(self, buffer: Any, offset: int) -> int:
        count = max(0, min(len(buffer), self.size() - offset))
        if count:
            self._node._read(buffer[:count], offset)
        return count

    def pwrite(self, data: bytes, offset: int) -> int:
        self._node._write(memoryview(data), offset, False)
        return len(data)

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        self._node._zero(offset, length, may_unmap, False)

    def punch(self, offset: int, length: int) -> None:
        self._node._discard(offset, length)

    def extent(self, offset: int, length: int) -> tuple[int, str]:
        size = self.size()
        if offset >= size:
            return length, "end"
        for run in self._node._extents(offset, min(size, offset + length)):
            return run.length, "zero" if run.zero else "data"
        return length, "end"

    def reserve(self, offset: int, length: int) -> None:
        self._node._reserve(offset, length)

    def flush(self) -> None:
        self._node._flush()

    def truncate(self, size: int) -> None:
        self._node._resize(size, True, "off")
