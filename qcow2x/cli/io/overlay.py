"""``-s``: a passing qcow2 image on top of a disk takes the writes, and ends with the program."""

from __future__ import annotations

import os
import tempfile

import qcow2x
from qcow2x.backing import GuestDisk
from qcow2x.drivers import Node, open_node
from qcow2x.drivers.qcow2 import Qcow2Node


class Overlay(Qcow2Node):
    """Made from the node that is below."""

    def __init__(self, below: Node, *, writable: bool) -> None:
        super().__init__(below.graph, {}, None)
        self.writable = writable
        self.unmap = True
        self.children["backing"] = below
        try:
            self.children["file"] = file = _passing_file(below.size)
            self.image = self.storage = qcow2x.open(
                file.storage, "r+", cache="unsafe", lock=False, backing=GuestDisk(below.storage)
            )
            self.header = self.image._header
        except BaseException:
            for child in self.children.values():
                child.close()
            raise


def _passing_file(size: int) -> Node:
    """An empty image in a file that nobody else finds."""
    # Where QEMU puts it: what a guest writes may be too much for a /tmp in memory.
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    handle, path = tempfile.mkstemp(prefix="vl.", dir=folder)
    try:
        os.close(handle)
        qcow2x.create(path, size)
        return open_node(path, format="file", writable=True, cache="unsafe")
    finally:
        os.unlink(path)
