"""Copy a part of a disk, counted in blocks: ``qemu-img dd`` as a function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from qcow2x.ops.convert import ConvertResult, convert
from qcow2x.ops.disk import extents_of, open_disk
from qcow2x.types import Extent, Progress

__all__ = ["dd"]


def dd(
    src: Any,
    dst: Any,
    *,
    block_size: int = 512,
    count: int | None = None,
    skip: int = 0,
    src_format: str | None = None,
    dst_format: str = "qcow2",
    threads: int | None = None,
    cache: str = "writeback",
    references: Any = "deny",
    key: Any = None,
    lock: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> ConvertResult:
    """Copy the blocks of the disk *src* from number *skip* up to number *count* to a new *dst*.

    Blocks are of *block_size* bytes, 1 to 2^31 - 1, and do not change how fast this is. As with
    qemu-img, *count* is counted from the start of the disk, so that ``count - skip`` blocks are
    copied; None: up to its end. Where *skip* leads past what is copied the new disk is empty. Zeros
    are not stored. Everything else, and what is raised, is as with :func:`qcow2x.convert`, which
    gets *options* too.

    Raises ValueError for a block size, count or skip out of range.
    """
    if not 1 <= block_size < 1 << 31:
        raise ValueError(f"block_size is {block_size}: it must be between 1 and {(1 << 31) - 1}")
    if skip < 0 or (count is not None and count < 0):
        raise ValueError("count and skip must not be negative")
    with ExitStack() as stack:
        disk, owned = open_disk(
            src, src_format, references=references, key=key, lock=lock
        )  # fmt: skip
        if owned:
            stack.callback(disk.close)
        end = disk.size if count is None else min(disk.size, count * block_size)
        part = Window(disk, min(end, skip * block_size), end)
        return convert(
            part,
            dst,
            dst_format=dst_format,
            threads=threads,
            cache=cache,
            references=references,
            lock=lock,
            progress=progress,
            **options,
        )


class Window:
    """The bytes of a disk from *start* to *end*, as a disk."""

    format = "window"

    def __init__(self, disk: Any, start: int, end: int) -> None:
        self._disk = disk
        self._start = start
        self.size = end - start
        #: What it is a part of.
        self.layers = [disk]

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        nbytes = self.size - offset if length is None else length
        for run in extents_of(self._disk, self._start + offset, nbytes):
            yield run._replace(offset=run.offset - self._start)

    def preadinto(self, buffer: Any, offset: int) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self.size - offset))
        return int(self._disk.preadinto(view[:wanted], self._start + offset)) if wanted else 0

    def close(self) -> None:
        self._disk.close()
