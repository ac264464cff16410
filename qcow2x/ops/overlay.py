"""Changes to a file that are kept aside until all of them are known.

A repair looks at an image through an overlay, so that it can look again at what it has changed,
tell what it would do, and save the old bytes, before the file itself is touched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

from qcow2x.storage import Storage

#: Changed pages beyond this many bytes wait in a temporary file.
MAX_IN_MEMORY = 16 << 20
MAX_RUN = 1 << 20
STEPS = 5


class Overlay:
    """A storage object for :class:`qcow2x.storage.PyStorage`: ``base`` with changes over it.

    Each change belongs to one of :data:`STEPS` steps, and :meth:`apply` makes each step durable
    before the next. Where a later step has changed a page already, an earlier one joins it: of the
    same bytes the last written count. Not for several threads at once.
    """

    def __init__(self, base: Storage, page_bytes: int) -> None:
        self.name = base.name
        self._base = base
        self._page = page_bytes
        self.old_size = base.size()
        self._size = self.old_size
        self._pages = tempfile.SpooledTemporaryFile(max_size=MAX_IN_MEMORY)
        self._slots = 0
        # Of each step: which slot of the pages file holds a page.
        self._steps: list[dict[int, int]] = [{} for _ in range(STEPS)]
        self._last_step: dict[int, int] = {}

    # ---- as a storage object ----

    def size(self) -> int:
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        buffer = bytearray(max(0, min(length, self._size - offset)))
        self.preadinto(buffer, offset)
        return bytes(buffer)

    def preadinto(self, buffer: Any, offset: int) -> int:
        with memoryview(buffer).cast("B") as view:
            nbytes = max(0, min(len(view), self._size - offset))
            there = max(0, min(nbytes, self.old_size - offset))
            if there:
                self._base.preadinto(view[:there], offset)
            view[there:nbytes] = bytes(nbytes - there)
            if self._last_step and nbytes:
                for page in range(offset // self._page, (offset + nbytes - 1) // self._page + 1):
                    if page in self._last_step:
                        self._patch(view[:nbytes], offset, page)
        return nbytes

    def _patch(self, view: memoryview, offset: int, page: int) -> None:
        start = page * self._page
        data = self._load(self._steps[self._last_step[page]][page])
        low, high = max(start, offset), min(start + self._page, offset + len(view))
        view[low - offset : high - offset] = data[low - start : high - start]

    def _load(self, slot: int) -> bytes:
        self._pages.seek(slot * self._page)
        return self._pages.read(self._page)

    # ---- changing ----

    def grow(self, size: int) -> None:
        """Be at least ``size`` bytes long; what is new reads as zeros."""
        self._size = max(self._size, size)

    def write(self, step: int, data: bytes, offset: int) -> None:
        """Change bytes, as a part of ``step``. Pages that hold them already stay unchanged."""
        # A table at the end of a file that was cut: zeros go without saying.
        data = data[: max(len(data.rstrip(b"\0")), self._size - offset)]
        if not data:
            return
        self.grow(offset + len(data))
        first, last = offset // self._page, (offset + len(data) - 1) // self._page
        start = first * self._page
        old = bytearray((last + 1 - first) * self._page)
        self.preadinto(old, start)
        new = bytearray(old)
        new[offset - start : offset - start + len(data)] = data
        for page in range(first, last + 1):
            at = (page - first) * self._page
            piece = new[at : at + self._page]
            if piece != old[at : at + self._page]:
                self._store(max(step, self._last_step.get(page, 0)), page, piece)

    def _store(self, step: int, page: int, data: bytearray) -> None:
        slot = self._steps[step].setdefault(page, self._slots)
        if slot == self._slots:
            self._slots += 1
        self._last_step[page] = step
        self._pages.seek(slot * self._page)
        self._pages.write(data)

    # ---- the outcome ----

    @property
    def changed(self) -> bool:
        return bool(self._last_step) or self._size != self.old_size

    def original_header(self) -> bytes:
        """The first 104 bytes of the file as it was."""
        return self._base.pread(104, 0).ljust(104, b"\0")

    def changes(self) -> Iterator[tuple[int, bytes, bytes]]:
        """``(offset, old, new)`` of everything that changes inside the file as it was."""
        for page in sorted(self._last_step):
            offset = page * self._page
            nbytes = min(self._page, self.old_size - offset)
            if nbytes > 0:
                new = self._load(self._steps[self._last_step[page]][page])[:nbytes]
                yield offset, self._base.pread(nbytes, offset), new

    def apply(self) -> None:
        """Makes the changes in the file, step by step, each durable before the next."""
        if self._size != self.old_size:
            self._base.truncate(self._size)
        for step in self._steps:
            for first, last in _runs(sorted(step), MAX_RUN // self._page):
                data = b"".join(self._load(step[page]) for page in range(first, last + 1))
                offset = first * self._page
                self._base.pwrite(data[: self._size - offset], offset)
            if step:
                self._base.flush()
        self._base.flush()

    def close(self) -> None:
        self._pages.close()


def _runs(pages: list[int], longest: int) -> Iterator[tuple[int, int]]:
    start = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1 or i - start == longest:
            yield pages[start], pages[i - 1]
            start = i
