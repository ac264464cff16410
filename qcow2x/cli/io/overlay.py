"""``-s``: a passing qcow2 image on top of a disk takes the writes, and ends with the program."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

from qcow2x.drivers.node import Node
from qcow2x.types import Extent


class Overlay(Node):
    """Made from the node that is below."""

    driver = "qcow2"

    def __init__(self, below: Node, *, writable: bool) -> None:
        super().__init__(below.graph, {}, None)
        self.writable = writable
        self.unmap = True
        try:
            self.image = self.storage = _overlay(below)
        except BaseException:
            below.close()
            raise
        self.children["backing"] = below

    def _size(self) -> int:
        assert self.image is not None
        return self.image.size

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        assert self.image is not None
        return self.image.extents(offset, end - offset)

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        assert self.image is not None
        self.image.write_zeroes(offset, length, unmap=unmap, fua=fua)

    def _discard(self, offset: int, length: int) -> None:
        assert self.image is not None
        self.image.discard(offset, length)

    def _resize(self, size: int, shrink: bool, preallocation: str) -> None:
        assert self.image is not None
        self.image.resize(size, shrink=shrink, preallocation=preallocation)

    def _close(self) -> None:
        assert self.image is not None
        self.image.close()


def _overlay(below: Node) -> Any:
    import qcow2x
    from qcow2x.backing import GuestDisk

    # Where QEMU puts it: what a guest writes may be too much for a /tmp in memory.
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    handle, path = tempfile.mkstemp(prefix="vl.", dir=folder)
    try:
        os.close(handle)
        qcow2x.create(path, below.size, overwrite=True)
        return qcow2x.open(
            path, "r+", cache="unsafe", lock=False, backing=GuestDisk(below.storage)
        )
    finally:
        # Open is enough; nobody else is to find it.
        os.unlink(path)
