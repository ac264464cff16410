"""Whether two disks read the same: ``qemu-img compare`` as a function."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from qcow2x.errors import Cancelled, Qcow2Error
from qcow2x.ops.copyjob import locate
from qcow2x.ops.disk import SECTOR, extents_of, open_disk, read_padded
from qcow2x.ops.pipeline import Pipeline, usable_cpus
from qcow2x.types import Extent, Progress

#: Bytes of each disk in one task: what is read at once, and blamed as a whole if that fails.
TASK_BYTES = 2 << 20

#: What a stretch of a disk is like: (data, zero, allocated).
State = tuple[bool, bool, bool]
PAST_END: State = (False, True, False)


@dataclass(frozen=True, slots=True)
class CompareResult:
    """The answer of :func:`compare`."""

    identical: bool
    #: Sizes of the two disks in bytes.
    sizes: tuple[int, int]
    #: ``"content"``, ``"size"`` or ``"allocation"``; None when identical.
    reason: str | None = None
    #: Guest offset of the first difference, None when there is none or only the sizes differ.
    offset: int | None = None

    def __bool__(self) -> bool:
        return self.identical


class _Found(Exception):
    """The first difference is known; stops the threads."""

    def __init__(self, reason: str, offset: int) -> None:
        self.reason, self.offset = reason, offset


def compare(
    first: Any,
    second: Any,
    *,
    first_format: str | None = None,
    second_format: str | None = None,
    strict: bool = False,
    threads: int | None = None,
    cache: str = "writeback",
    references: Any = "deny",
    lock: bool = True,
    progress: Progress | None = None,
) -> CompareResult:
    """Compare what two disks read as, through their backing chains.

    *first* and *second* are paths, open images or storage objects; formats and *references* are as
    for :func:`qcow2x.ops.convert.convert`. Sizes may differ as long as the rest of the longer disk
    reads as zeros; with *strict* the sizes have to be equal, and both disks have to tell data,
    zeros and unallocated ranges apart in the same way. Stops at the first difference. Parts that
    the metadata of both calls zero are not read. Returning False from *progress* raises Cancelled.

    What reading raises has the attributes ``doing`` (``"reading"`` or ``"reading block status"``),
    ``guest_offset`` and ``disk`` (0 or 1).
    """
    with ExitStack() as stack:
        disks = []
        for source, format in ((first, first_format), (second, second_format)):
            disk, owned = open_disk(source, format, cache=cache, references=references, lock=lock)
            if owned:
                stack.callback(disk.close)
            disks.append(disk)
        sizes = (disks[0].size, disks[1].size)
        # A disk has whole sectors: what is missing of a raw file's last one reads as zeros.
        if strict and -(-sizes[0] // SECTOR) != -(-sizes[1] // SECTOR):
            return CompareResult(False, sizes, "size")
        try:
            _Job(disks[0], disks[1], strict, progress).run(threads or min(usable_cpus(), 8))
        except _Found as found:
            return CompareResult(False, sizes, found.reason, found.offset)
        return CompareResult(True, sizes)


class _Job:
    def __init__(self, first: Any, second: Any, strict: bool, progress: Progress | None) -> None:
        from qcow2x._core import bulk

        self.bulk = bulk
        self.first, self.second = first, second
        self.strict = strict
        self.progress = progress
        self.size = max(first.size, second.size)
        self.done = 0

    def run(self, threads: int) -> None:
        slots = [
            (memoryview(mmap.mmap(-1, TASK_BYTES)), memoryview(mmap.mmap(-1, TASK_BYTES)))
            for _ in range(2 * threads)
        ]
        pipeline = Pipeline(self.tasks(), self.process, self.finish, slots, threads)
        self.report(0)
        pipeline.run(lambda: self.report(self.done))
        self.report(self.size)

    def report(self, done: int) -> None:
        if self.progress is not None and self.progress(done, self.size, "compare") is False:
            raise Cancelled("comparison cancelled")

    def tasks(self) -> Iterator[tuple[int, int, bool, bool, str | None]]:
        """``(offset, length, first is zero, second is zero, difference known already)``."""
        left, right = self.states(self.first, 0), self.states(self.second, 1)
        for low, high, one, two in overlay(left, right):
            if self.strict and one != two:
                yield low, high - low, one[1], two[1], "allocation"
            if one[1] and two[1]:
                yield low, high - low, True, True, None
                continue
            for at in range(low, high, TASK_BYTES):
                yield at, min(TASK_BYTES, high - at), one[1], two[1], None

    def states(self, disk: Any, number: int) -> Iterator[tuple[int, int, State]]:
        """``(start, end, state)`` over the longer disk's whole size."""
        end = 0
        try:
            for extent in extents_of(disk):
                end = extent.offset + extent.length
                yield extent.offset, end, _state(extent)
        except (OSError, Qcow2Error) as exc:
            locate(exc, "reading block status", end, number)
            raise
        if end < self.size:
            yield end, self.size, PAST_END

    def process(
        self, task: tuple[Any, ...], slot: tuple[memoryview, memoryview]
    ) -> tuple[Any, ...]:
        offset, length, first_zero, second_zero, known = task
        if known:
            return known, offset, 0
        at = None
        if not (first_zero and second_zero):
            one, two = slot[0][:length], slot[1][:length]
            try:
                number = 0
                if not first_zero:
                    read_padded(self.first, one, offset)
                number = 1
                if not second_zero:
                    read_padded(self.second, two, offset)
            except (OSError, Qcow2Error) as exc:
                # Raised in the order of the disk: a difference in front of it comes first.
                locate(exc, "reading", offset, number)
                return exc, offset, 0
            if first_zero or second_zero:
                at = self.bulk.first_nonzero(two if first_zero else one)
            else:
                at = self.bulk.first_difference(one, two)
        return "content", None if at is None else offset + at, length

    def finish(self, result: tuple[Any, ...]) -> None:
        reason, offset, length = result
        if isinstance(reason, Exception):
            raise reason
        if offset is not None:
            raise _Found(reason, offset)
        self.done += length


def _state(extent: Extent) -> State:
    return extent.data, extent.zero or not extent.data, extent.allocated


def overlay(
    left: Iterator[tuple[int, int, State]], right: Iterator[tuple[int, int, State]]
) -> Iterator[tuple[int, int, State, State]]:
    """Cut two gapless lists of runs of one total length at each other's edges."""
    one, two = next(left, None), next(right, None)
    at = 0
    while one is not None and two is not None:
        end = min(one[1], two[1])
        if end > at:
            yield at, end, one[2], two[2]
            at = end
        if one[1] <= at:
            one = next(left, None)
        if two is not None and two[1] <= at:
            two = next(right, None)
