"""What drivers have in common that show the disk of their one child, with something done on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qcow2x.drivers.node import Node
from qcow2x.types import Extent


class FilterNode(Node):
    """A node that passes everything on to the child ``primary``."""

    is_filter = True

    @property
    def below(self) -> Node:
        return self.children[self.primary]

    @property
    def fixed_size(self) -> bool:  # type: ignore[override]
        return self.below.fixed_size

    @property
    def cluster_granularity(self) -> int:
        return self.below.cluster_granularity

    @property
    def backing_chain(self) -> list[Any]:
        return self.below.backing_chain

    def _size(self) -> int:
        return self.below._size()

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        return self.below._extents(offset, end)

    def _read(self, view: memoryview, offset: int) -> None:
        self.below._read(view, offset)

    def _write(self, view: memoryview, offset: int, fua: bool) -> None:
        self.below._write(view, offset, fua)

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        self.below._zero(offset, length, unmap, fua)

    def _discard(self, offset: int, length: int) -> None:
        self.below._discard(offset, length)

    def _reserve(self, offset: int, length: int) -> None:
        self.below._reserve(offset, length)

    def _flush(self) -> None:
        self.below._flush()

    def _resize(self, size: int, shrink: bool, preallocation: str) -> None:
        self.below._resize(size, shrink, preallocation)
