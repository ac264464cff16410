"""The work of a conversion: what is to be copied, read on many threads, written in one order."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from qcow2x.errors import Cancelled, Qcow2Error
from qcow2x.ops.disk import SECTOR, extents_of, image_of, read_padded
from qcow2x.ops.offload import copy_range, is_in_page_cache
from qcow2x.ops.pipeline import Pipeline
from qcow2x.ops.rate import RateLimit
from qcow2x.types import Extent, Progress

DATA, ZERO, KEEP = "data", "zero", "keep"
#: What ``process`` adds to those for ``finish``.
PACKED, OFFLOAD, LOST, FAILED = "packed", "offload", "lost", "failed"

#: Bytes of guest data in one task: long enough that a task's fixed cost does not show, short
#: enough that tasks stay in the processor's cache and a cancel is answered at once.
TASK_BYTES = 1 << 20
#: A file in the page cache is written in pieces of this: the kernel makes a folio of the size of an
#: aligned write, and looks longer for free memory of 1 MiB in a row than the copying takes (1.5 GiB
#: into a new file: 2.0 to 4.0 s in pieces of 1 MiB, 0.7 s in pieces of 256 KiB, as of 128 KiB).
CACHED_PIECE = 256 << 10
#: Runs in one task, for sources of many small ones.
TASK_RUNS = 128
#: A zero run is written in pieces of this, so that it can be cancelled between them.
ZERO_PIECE = 64 << 20
MEMORY_BASE = 64 << 20
MEMORY_PER_THREAD = 4 << 20

COMPRESSION_TYPES = {"zlib": 0, "zstd": 1}

#: (DATA | ZERO | KEEP, offset, length) of one stretch of the guest disk.
Run = tuple[str, int, int]


class Damage(NamedTuple):
    """A sector of the source that could not be read, or of which nothing could be learned."""

    #: Guest offset in bytes.
    offset: int
    #: ``"data"`` (its place in the target reads as zeros) or ``"status"`` (it was read all the same).
    what: str
    error: Exception


class _Slot:
    """The memory of one task in flight."""

    def __init__(self, nbytes: int, compress: bool) -> None:
        # Anonymous maps: page aligned, as O_DIRECT asks, and no memory until they are used.
        self.raw = memoryview(mmap.mmap(-1, nbytes))
        self.packed = memoryview(mmap.mmap(-1, nbytes)) if compress else memoryview(b"")


def locate(exc: BaseException, doing: str, offset: int | None = None, disk: int = 0) -> None:
    """Notes on an exception what was being done, and for which byte of which disk."""
    if not hasattr(exc, "doing"):
        exc.doing, exc.guest_offset, exc.disk = doing, offset, disk  # type: ignore[attr-defined]


def plan_runs(
    extents: Iterator[Extent], size: int, grain: int, kind_of: Callable[[Extent], str]
) -> Iterator[tuple[str, int, int]]:
    """Merge *extents* into ``(kind, start, end)`` runs that start and end on multiples of *grain*.

    A grain in which several kinds meet is DATA: reading it from the source gives what belongs
    there. The last run ends at *size*.
    """
    kind, start, end = "", 0, 0
    for extent in extents:
        new_kind = kind_of(extent)
        low, high = max(extent.offset, end), min(extent.offset + extent.length, size)
        if low >= high:
            continue
        if new_kind != kind and low % grain:
            # This extent begins inside the last grain of the run before.
            edge = low - low % grain
            if kind != DATA:
                if edge > start:
                    yield kind, start, edge
                kind, start = DATA, edge
            end = low = min(edge + grain, size)
            if low >= high:
                continue
        if new_kind == kind:
            end = high
        else:
            if end > start:
                yield kind, start, end
            kind, start, end = new_kind, low, high
    if end > start:
        yield kind, start, end


class CopyJob:
    """One copy in progress: plans tasks, does their heavy part, writes them in order.

    ``zero_from`` is where the part of the target begins that reads as zeros without being written
    to. With ``keep_lower`` what the source's top layer does not hold is left as the target has it.
    """

    #: What progress is told to be of, and what is said where it ends this.
    phase = "convert"
    cancelled = "conversion cancelled; the target was not made"

    def __init__(
        self,
        *,
        source: Any,
        target: Any,
        size: int,
        zero_from: int,
        compress: bool = False,
        level: int = 0,
        sparse_size: int = 4096,
        keep_lower: bool = False,
        offload: bool = False,
        rate: RateLimit | None = None,
        salvage: bool = False,
        on_damage: Callable[[Damage], object] | None = None,
        progress: Progress | None = None,
    ) -> None:
        from qcow2x._core import bulk

        self.bulk = bulk
        self.source = source
        self.target = target
        self.image = image_of(target)
        self.size = size
        self.zero_from = zero_from
        self.compress = compress
        self.level = level
        self.sparse_size = sparse_size
        self.keep_lower = keep_lower
        self.offload = offload
        self.rate = rate
        self.salvage = salvage
        self.on_damage = on_damage
        self.progress = progress
        self.type = 0
        if compress:
            self._choose_codec()

        #: Zero detection and the edges of writes go by this unit.
        self.grain = 4096 if self.image is None else self._image_grain()
        if sparse_size and not compress:
            # Writes are aligned to what counts as a run of zeros, so that little of a target's
            # block has to be read and merged for them.
            aligned = 1 << (sparse_size.bit_length() - 1)
            self.grain = aligned if self.image is None else max(self.grain, aligned)
        unit = max(self.grain, getattr(self.image, "cluster_size", 1))
        #: Tasks are cut on multiples of this, so that no cluster is decoded for two of them.
        self.cut = max(unit, getattr(source, "cluster_size", 1) or 1)
        self.task_bytes = max(TASK_BYTES, self.cut)
        self.write_piece = CACHED_PIECE if is_in_page_cache(target) else self.task_bytes
        self.min_zero = self.grain if compress else min(max(sparse_size, self.grain), TASK_BYTES)

        self.counters = threading.Lock()
        #: Progress is told in bytes that the source's metadata calls data: what takes time.
        self.total = 0
        self.done = 0
        self.told = -1
        self.steps: deque[int] = deque()
        self.data_bytes = 0
        self.zero_bytes = 0
        self.compressed_bytes = 0
        self.lost_bytes = 0
        self.unknown: deque[Damage] = deque()

    def _choose_codec(self) -> None:
        if self.image is None:
            raise ValueError("Compression not supported for this file format")
        name = self.image.info().compression_type
        self.type = COMPRESSION_TYPES[name]
        low, high = self.bulk.level_range(self.type)
        if self.level and not low <= self.level <= high:
            raise ValueError(f"level {self.level} is not between {low} and {high} for {name}")

    def _image_grain(self) -> int:
        cluster = int(self.image.cluster_size)
        if self.compress:
            return cluster
        return cluster // 32 if self.image.info().extended_l2 else cluster

    @property
    def in_order(self) -> bool:
        # A disk without a mapping has a place for every byte; only an image's layout depends on
        # the order. What is told of damage should come in one, too.
        return self.image is not None or self.salvage

    def run(self, threads: int) -> None:
        """Copies. Raises Cancelled, and what reading and writing raise (see :func:`locate`)."""
        memory = self.task_bytes * (2 if self.compress else 1)
        budget = MEMORY_BASE + MEMORY_PER_THREAD * threads
        n_slots = max(1, min(2 * threads, budget // memory))
        slots = [_Slot(self.task_bytes, self.compress) for _ in range(n_slots)]
        pipeline = Pipeline(
            self.tasks(),
            self.process,
            self.finish,
            slots,
            min(threads, n_slots),
            in_order=self.in_order,
        )
        if self.salvage or self.progress is not None:
            self._look_ahead()
        self.report(0)
        try:
            pipeline.run(self._tick)
        finally:
            if self.rate is not None:
                self.rate.stop()
        self._tell_damage([], self.size)
        if self.told < self.total:
            self.report(self.total)

    def _look_ahead(self) -> None:
        """How much there is to copy, and what is in doubt: told before anything is."""
        for kind, start, end in plan_runs(self.extents(), self.size, self.grain, self.kind_of):
            if kind == DATA:
                self.total += end - start
            self._tell_damage([], self.size)
        self._tell_damage([], self.size)

    def _tick(self) -> None:
        while self.steps:
            self.report(self.steps.popleft())
        self.report(self.done)

    def report(self, done: int) -> None:
        self.told = done
        if self.progress is not None and self.progress(done, self.total, self.phase) is False:
            if self.rate is not None:
                self.rate.stop()
            raise Cancelled(self.cancelled)

    # Planning: from the source's metadata alone.

    def kind_of(self, extent: Extent) -> str:
        if self.keep_lower and extent.depth > 0:
            return KEEP
        if self.sparse_size and (extent.zero or not extent.data):
            return ZERO
        return DATA

    def extents(self) -> Iterator[Extent]:
        """Those of the source, and a zero one for what is left of its last sector."""
        yield from self._salvaged_extents() if self.salvage else self._known_extents()
        end = self.source.size
        if end < self.size:
            yield Extent(end, self.size - end, False, True, False, 0, None, None)

    def _known_extents(self) -> Iterator[Extent]:
        at = 0
        try:
            for extent in extents_of(self.source):
                at = extent.offset + extent.length
                yield extent
        except (OSError, Qcow2Error) as exc:
            locate(exc, "reading block status", at)
            raise

    def _salvaged_extents(self) -> Iterator[Extent]:
        """Asks for less and less where asking fails. A sector of which nothing can be learned is
        taken for data."""
        at, end = 0, self.source.size
        length = end
        while at < end:
            length = min(length, end - at)
            try:
                for extent in extents_of(self.source, at, length):
                    at = extent.offset + extent.length
                    yield extent
            except (OSError, Qcow2Error) as exc:
                if length > SECTOR:
                    length = max(SECTOR, length // 4 // SECTOR * SECTOR)
                    continue
                self.unknown.append(Damage(at, "status", exc))
                yield Extent(at, length, True, False, False, 0, None, None)
                at += length
            else:
                length *= 4

    def tasks(self) -> Iterator[list[Run]]:
        """The work in order. Zero runs that need no write are only counted."""
        task: list[Run] = []
        room = self.task_bytes
        for kind, start, end in plan_runs(self.extents(), self.size, self.grain, self.kind_of):
            if kind == KEEP:
                continue
            if kind == ZERO:
                # What reads as zeros anyway needs no write.
                stop = min(end, max(start, self.zero_from))
                self.count(zero=end - stop)
                if task and start < stop:
                    yield task
                    task, room = [], self.task_bytes
                for at in range(start, stop, ZERO_PIECE):
                    yield [(ZERO, at, min(ZERO_PIECE, stop - at))]
                continue
            while start < end:
                stop = min(end, start + room)
                if stop < end:
                    stop -= stop % self.cut
                if stop <= start or len(task) == TASK_RUNS:
                    yield task
                    task, room = [], self.task_bytes
                    continue
                task.append((DATA, start, stop - start))
                # The buffer is filled in whole grains.
                room -= -(-(stop - start) // self.grain) * self.grain
                start = stop
        if task:
            yield task

    # The heavy part: any thread, any order.

    def process(self, task: list[Run], slot: _Slot) -> tuple[int, list[tuple[Any, ...]]]:
        """Read a task, find its zeros, compress it; returns how many bytes it has of what progress
        counts, and what ``finish`` has to write."""
        return sum(run[2] for run in task if run[0] == DATA), self._writes_for(task, slot)

    def _writes_for(self, task: list[Run], slot: _Slot) -> list[tuple[Any, ...]]:
        writes: list[tuple[Any, ...]] = []
        at = used = 0
        for kind, offset, length in task:
            if kind == ZERO:
                writes.append((ZERO, offset, length))
                continue
            if self.offload and self._copied_inside_the_kernel(offset, length):
                writes.append((OFFLOAD, offset, length))
                continue
            padded = -(-length // self.grain) * self.grain
            view = slot.raw[at : at + padded]
            at += padded
            try:
                self.read(view[:length], offset, writes)
            except (OSError, Qcow2Error) as exc:
                # Raised in its turn, so that the first one of the disk is the one that is told.
                locate(exc, "reading", offset)
                return [*writes, (FAILED, offset, exc)]
            if padded > length:
                self.bulk.fill_zero(view[length:])
            for start, run in self.data_runs(view[:length], offset, writes):
                if not self.compress:
                    writes.append((DATA, offset + start, view[start : start + run]))
                    continue
                whole = -(-run // self.grain) * self.grain
                room = slot.packed[used : used + whole]
                size, sizes = self.bulk.compress_batch(
                    view[start : start + whole], self.grain, self.type, self.level, room
                )
                used += size
                writes.append(
                    (PACKED, offset + start, view[start : start + run], room[:size], sizes)
                )
        return writes

    def read(self, view: memoryview, offset: int, writes: list[tuple[Any, ...]]) -> None:
        try:
            read_padded(self.source, view, offset)
        except (OSError, Qcow2Error):
            if not self.salvage:
                raise
            for at in range(0, len(view), SECTOR):
                self._read_sector(view[at : at + SECTOR], offset + at, writes)

    def _read_sector(self, view: memoryview, offset: int, writes: list[tuple[Any, ...]]) -> None:
        try:
            read_padded(self.source, view, offset)
        except (OSError, Qcow2Error) as exc:
            self.bulk.fill_zero(view)
            writes.append((LOST, offset, Damage(offset, "data", exc)))

    def _copied_inside_the_kernel(self, offset: int, length: int) -> bool:
        if self.rate is not None:
            self.rate.take(length)
        if not copy_range(self.source, offset, length, self.target):
            # What cannot be done for one run cannot be done for the next.
            self.offload = False
        return self.offload

    def data_runs(
        self, view: memoryview, offset: int, writes: list[tuple[Any, ...]]
    ) -> Iterator[tuple[int, int]]:
        """The runs of *view* to store; the zeros between them are put in *writes* in their order."""
        if not self.sparse_size:
            yield 0, len(view)
            return
        end = 0
        for start, length in self.bulk.data_runs(view, self.grain, self.min_zero):
            if start > end:
                writes.append((ZERO, offset + end, start - end))
            yield start, length
            end = start + length
        if end < len(view):
            writes.append((ZERO, offset + end, len(view) - end))

    # The writes: in task order for an image.

    def finish(self, result: tuple[int, list[tuple[Any, ...]]]) -> None:
        done, writes = result
        data = zero = packed_bytes = 0
        lost: list[Damage] = []
        for kind, offset, what, *packed in writes:
            if kind == FAILED:
                raise what
            if kind == LOST:
                lost.append(what)
                continue
            nbytes = what if kind in (ZERO, OFFLOAD) else len(what)
            try:
                self.write(kind, offset, what, packed)
            except (OSError, Qcow2Error) as exc:
                locate(exc, "writing", offset)
                raise
            if kind == ZERO:
                zero += nbytes
            else:
                data += nbytes
            if kind == PACKED:
                packed_bytes += len(packed[0])
        if self.salvage and writes:
            self._tell_damage(lost, self._end_of(writes))
        self.count(done, data=data, zero=zero, packed=packed_bytes)

    @staticmethod
    def _end_of(writes: list[tuple[Any, ...]]) -> int:
        """The last byte of the disk that these concern."""
        last = 0
        for kind, offset, what, *_ in writes:
            nbytes = SECTOR if kind == LOST else what if isinstance(what, int) else len(what)
            last = max(last, offset + nbytes - 1)
        return last

    def write(self, kind: str, offset: int, what: Any, packed: list[Any]) -> None:
        if kind == OFFLOAD:
            return
        if kind == ZERO:
            if offset < self.zero_from:
                nbytes = min(what, self.zero_from - offset)
                self.target.write_zeroes(offset, nbytes, unmap=True)
            return
        if self.rate is not None:
            self.rate.take(len(what))
        if kind == DATA:
            for at in range(0, len(what), self.write_piece):
                self.target.pwrite(what[at : at + self.write_piece], offset + at)
        else:
            self.image.write_compressed_batch(packed[0], packed[1], what, offset)

    def _tell_damage(self, lost: list[Damage], end: int) -> None:
        """What is known to be damaged in front of *end*, and what of the task that ends behind it,
        in the order of the disk."""
        told = list(lost)
        last = max([end, *(damage.offset for damage in lost)])
        while self.unknown and self.unknown[0].offset <= last:
            told.append(self.unknown.popleft())
        self.lost_bytes += SECTOR * len(lost)
        for damage in sorted(told, key=lambda damage: (damage.offset, damage.what != "status")):
            if self.on_damage is not None:
                self.on_damage(damage)

    def count(self, done: int = 0, *, data: int = 0, zero: int = 0, packed: int = 0) -> None:
        with self.counters:
            before, self.done = self.done, self.done + done
            if self.total and 100 * self.done // self.total > 100 * before // self.total:
                self.steps.append(self.done)
            self.data_bytes += data
            self.zero_bytes += zero
            self.compressed_bytes += packed
