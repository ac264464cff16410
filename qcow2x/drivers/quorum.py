"""``quorum``: one disk kept in several places. What most of them say is what is read."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from qcow2x.drivers import options as opts
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.hooks import HookStorage
from qcow2x.drivers.node import Node
from qcow2x.drivers.options import Options
from qcow2x.storage import PyStorage
from qcow2x.types import Extent

_PATTERNS = ("quorum", "fifo")


class QuorumNode(Node):
    driver = "quorum"
    is_protocol = True
    strong = ("vote-threshold", "rewrite-corrupted", "read-pattern")

    def open(self, options: Options) -> None:
        self._threshold = opts.take_number(options, "vote-threshold") or 0
        pattern = opts.take_text(options, "read-pattern") or "quorum"
        self._first_that_can = pattern == "fifo"
        self._rewrites = opts.take_bool(options, "rewrite-corrupted")
        count = _count(options)
        if count < 1:
            raise OptionError("Number of provided children must be 1 or more")
        if self._threshold < 1:
            raise OptionError("Parameter 'vote-threshold' expects a value >= 1")
        if self._threshold > count:
            raise OptionError("threshold may not exceed children count")
        if pattern not in _PATTERNS:
            raise OptionError("Please set read-pattern as fifo or quorum")
        for index in range(count):
            self.graph.open_child(self, f"children.{index}", options, probing=True)
        self.storage = PyStorage(HookStorage(self), self.writable)

    def own_filename(self) -> str | None:
        return ""

    def gather_children(self, options: dict[str, Any], backing_overridden: bool) -> None:
        options["children"] = [child.full_options for child in self.children.values()]

    def _size(self) -> int:
        sizes = {child.size for child in self.children.values()}
        if len(sizes) > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.filename)
        return sizes.pop()

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        while offset < end:
            runs = [next(iter(c._extents(offset, end))) for c in self.children.values()]
            data = any(not run.zero for run in runs)
            nbytes = min(run.length for run in runs)
            yield Extent(offset, nbytes, data, not data, False, 0, None, self.filename)
            offset += nbytes

    def _read(self, view: memoryview, offset: int) -> None:
        if self._first_that_can:
            self._read_first(view, offset)
            return
        said: dict[str, bytes] = {}
        failure: OSError | None = None
        for name, child in self.children.items():
            buffer = bytearray(len(view))
            try:
                child._read(memoryview(buffer), offset)
            except OSError as exc:
                failure = exc
            else:
                said[name] = bytes(buffer)
        if len(said) < self._threshold and failure is not None:
            raise failure
        most, votes = Counter(said.values()).most_common(1)[0]
        if votes < self._threshold:
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.filename)
        view[:] = most
        if self._rewrites and self.writable:
            for name, copy in said.items():
                if copy != most:
                    self.children[name]._write(memoryview(most), offset, False)

    def _read_first(self, view: memoryview, offset: int) -> None:
        failure: OSError | None = None
        for child in self.children.values():
            try:
                child._read(view, offset)
                return
            except OSError as exc:
                failure = exc
        assert failure is not None
        raise failure

    def _write(self, view: memoryview, offset: int, fua: bool) -> None:
        self._everywhere(lambda child: child._write(view, offset, fua))

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        self._everywhere(lambda child: child._zero(offset, length, unmap, fua))

    def _discard(self, offset: int, length: int) -> None:
        """Nothing: what a discarded range reads as may differ from place to place."""

    def _flush(self) -> None:
        self._everywhere(lambda child: child._flush())

    def _resize(self, size: int, shrink: bool, preallocation: str) -> None:
        if size != self._size():
            raise OSError(errno.ENOTSUP, "Image format driver does not support resize")

    def _everywhere(self, change: Callable[[Node], None]) -> None:
        """Done at each child; it has happened if it did at as many as have to agree."""
        failure: OSError | None = None
        done = 0
        for child in self.children.values():
            try:
                change(child)
                done += 1
            except OSError as exc:
                failure = exc
        if done < self._threshold:
            assert failure is not None
            raise failure


def _count(options: Options) -> int:
    """How many children are given: those of ``children.0``, ``children.1`` and on."""
    given = {key.split(".", 2)[1] for key in options if key.startswith("children.")}
    if given != {str(index) for index in range(len(given))}:
        raise OptionError("Option children is not a valid array")
    return len(given)
