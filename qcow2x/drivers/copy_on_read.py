"""Copy-on-read: what is read from below is kept above, so that it is read from there next time.

``open_node(copy_on_read=True)`` does it on the node on top, the driver ``copy-on-read`` anywhere.
"""

from __future__ import annotations

from qcow2x._core.bulk import is_zero
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.filter import FilterNode
from qcow2x.drivers.hooks import HookStorage
from qcow2x.drivers.node import Node
from qcow2x.drivers.options import Options
from qcow2x.storage import PyStorage

#: What is copied at once, so that a read of gigabytes needs no such buffer.
_PIECE = 4 << 20


def read_and_copy(node: Node, view: memoryview, offset: int) -> None:
    """Reads through ``node`` as it is without copy-on-read, and writes what its top layer does not
    hold yet into it, whole clusters. The caller keeps writers away meanwhile, or what they write
    could be overwritten with what was read before."""
    unit = node.cluster_granularity
    end = min(node.size, -(-(offset + len(view)) // unit) * unit)
    start = offset - offset % unit
    while start < end:
        run = next(iter(node._extents(start, end)))
        held = run.depth == 0 and run.allocated
        nbytes = run.length if held else min(run.length, _PIECE)
        low, high = max(start, offset), min(start + nbytes, offset + len(view))
        if held:
            if low < high:
                node._read(view[low - offset : high - offset], low)
        else:
            piece = memoryview(bytearray(nbytes))
            node._read(piece, start)
            node.at_event("cor_write")
            if is_zero(piece):
                node._zero(start, nbytes, False, False)
            else:
                node._write(piece, start, False)
            if low < high:
                view[low - offset : high - offset] = piece[low - start : high - start]
        start += nbytes


class CopyOnReadNode(FilterNode):
    driver = "copy-on-read"

    def open(self, options: Options) -> None:
        if not self.writable:
            raise OptionError("Block node is read-only")
        self.storage = PyStorage(HookStorage(self), True)

    def _read(self, view: memoryview, offset: int) -> None:
        with self.writing:
            read_and_copy(self.below, view, offset)

    def _write(self, view: memoryview, offset: int, fua: bool) -> None:
        with self.writing:
            super()._write(view, offset, fua)

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        with self.writing:
            super()._zero(offset, length, unmap, fua)

    def _discard(self, offset: int, length: int) -> None:
        with self.writing:
            super()._discard(offset, length)
