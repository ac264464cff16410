"""Copy a disk into a new image of any supported format: ``qemu-img convert`` as a function."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from qcow2x.errors import Cancelled
from qcow2x.ops.disk import SECTOR, ConcatDisk, RawDisk, extents_of, is_disk, open_disk, read_padded
from qcow2x.ops.pipeline import Pipeline, usable_cpus
from qcow2x.ops.target import NewFile, is_device, is_path
from qcow2x.types import Extent, Progress

DATA, ZERO, KEEP = "data", "zero", "keep"

#: Bytes of guest data in one task: long enough that a task's fixed cost does not show, short
#: enough that tasks stay in the processor's cache and a cancel is answered at once.
TASK_BYTES = 1 << 20
#: Runs in one task, for sources of many small ones.
TASK_RUNS = 128
#: A zero run is written in pieces of this, so that it can be cancelled between them.
ZERO_PIECE = 64 << 20
MEMORY_BASE = 64 << 20
MEMORY_PER_THREAD = 4 << 20

COMPRESSION_TYPES = {"zlib": 0, "zstd": 1}

#: (DATA | ZERO | KEEP, offset, length) of one stretch of the guest disk.
Run = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a conversion did; all in bytes."""

    #: Virtual size of the target.
    size: int
    #: Guest bytes written as data, before compression.
    data_bytes: int
    #: Bytes those take as compressed clusters, or None when nothing was compressed.
    compressed_bytes: int | None
    #: Guest bytes that read as zeros and were not stored.
    zero_bytes: int
    #: What the host gives to the target now.
    actual_size: int


class _Slot:
    """The memory of one task in flight."""

    def __init__(self, nbytes: int, compress: bool) -> None:
        # Anonymous maps: page aligned, as O_DIRECT asks, and no memory until they are used.
        self.raw = memoryview(mmap.mmap(-1, nbytes))
        self.packed = memoryview(mmap.mmap(-1, nbytes)) if compress else memoryview(b"")


def convert(
    src: Any,
    dst: Any,
    *,
    src_format: str | None = None,
    dst_format: str = "qcow2",
    compress: bool = False,
    compression_type: str = "zlib",
    level: int | None = None,
    threads: int | None = None,
    cluster_size: int = 65536,
    compat: str = "1.1",
    refcount_bits: int = 16,
    lazy_refcounts: bool = False,
    extended_l2: bool = False,
    preallocation: str = "off",
    backing_file: str | None = None,
    backing_format: str | None = None,
    size: int | None = None,
    sparse_size: int = 4096,
    target_exists: bool = False,
    target_is_zero: bool = False,
    cache: str = "writeback",
    src_cache: str = "writeback",
    references: Any = "deny",
    snapshot: str | None = None,
    key: Any = None,
    lock: bool = True,
    progress: Progress | None = None,
) -> ConvertResult:
    """Copy the disk *src* to *dst*.

    *src* is a path, an open :class:`qcow2x.Image`, a storage object, or a list of these that are
    put one after another; *src_format* is ``"qcow2"``, ``"raw"`` or None to look. *dst* is a path,
    descriptor or storage object, or with *target_exists* also an open image; then only the disk's
    content is replaced, and options that describe a new image do not count.

    A new file appears whole and durable, or not at all: it is written under a temporary
    name beside the target and renamed. The bytes of the target do not depend on *threads* (default:
    one per CPU, at most 16). Memory stays below 64 MiB + 4 MiB a thread.

    Runs of at least *sparse_size* zero bytes (0: look for none and allocate everything) are not
    stored. With *backing_file* only what the top layer of *src* holds is copied, as the backing
    file already shows the rest. *level* is 1..9 for zlib and 1..19 for zstd. *references* is the
    policy for files that the source names, *lock* says whether to heed other programs' locks (see
    :func:`qcow2x.open`). Returning False from *progress* cancels.

    Raises Cancelled, ImageLocked, ValueError for options that do not go together, and what opening, reading and
    writing raise.
    """
    _check_options(dst_format, compress, compression_type, preallocation, sparse_size, threads)
    if backing_file is not None and not backing_format:
        raise ValueError("Use of backing file requires explicit backing format")
    options = {
        "cluster_size": cluster_size,
        "compat": compat,
        "refcount_bits": refcount_bits,
        "backing_file": backing_file,
        "backing_format": backing_format,
        "preallocation": preallocation,
        "lazy_refcounts": lazy_refcounts,
        "extended_l2": extended_l2,
        "compression_type": compression_type,
    }
    with ExitStack() as stack:
        source = _open_source(
            stack, src, src_format, cache=src_cache, references=references,
            snapshot=snapshot, key=key, lock=lock,
        )  # fmt: skip
        granule = SECTOR if dst_format == "qcow2" else 1
        wanted = -(-source.size // granule) * granule if size is None else size

        new_file = None
        # Whether all of the target reads as zeros, apart from what a backing file shows.
        is_fresh = not target_exists
        if target_exists:
            target = _open_existing(stack, dst, dst_format, cache, references, lock)
            wanted = target.size
        elif is_device(dst) and dst_format == "raw":
            target = stack.enter_context(RawDisk(dst, "r+", cache, lock=lock))
            wanted = target.size
            is_fresh = False
        elif is_device(dst) or not is_path(dst):
            # A device, descriptor or object has no other name to be written under.
            if dst_format == "raw":
                target = stack.enter_context(RawDisk(dst, "r+", cache, lock=lock))
                target.resize(0, shrink=True)
                target.resize(wanted, preallocation=preallocation)
            else:
                target = _create_image(stack, dst, wanted, cache, references, backing_file, options)
        else:
            _refuse_own_source(source, dst)
            new_file = stack.enter_context(NewFile(dst, lock=lock))
            if dst_format == "raw":
                target = RawDisk(new_file.path, "r+", cache)
                stack.callback(target.close)
                target.resize(wanted, preallocation=preallocation)
            else:
                # Nobody sees the file before it is whole and synced: the order of its writes
                # needs no barriers of its own.
                inner = "unsafe" if cache == "writeback" else cache
                target = _create_image(
                    stack, new_file.path, wanted, inner, references, backing_file, options
                )

        if wanted < source.size:
            raise ValueError("output file is smaller than input file")

        job = _Job(
            source=source,
            target=target,
            size=min(wanted, -(-source.size // SECTOR) * SECTOR),
            compress=compress,
            compression_type=compression_type,
            level=level or 0,
            sparse_size=sparse_size,
            keep_lower=backing_file is not None,
            reads_zero=target_is_zero or (is_fresh and backing_file is None),
            progress=progress,
        )
        job.run(threads or min(usable_cpus(), 16))
        target.flush()
        # Of a growing image, closing trims what was reserved ahead: it has to come before the sync.
        if target is not dst:
            target.close()
        if new_file is not None:
            new_file.commit(sync=cache != "unsafe")
        return job.result(dst, wanted)


def _check_options(
    dst_format: str,
    compress: bool,
    compression_type: str,
    preallocation: str,
    sparse_size: int,
    threads: int | None,
) -> None:
    if dst_format not in ("qcow2", "raw"):
        raise ValueError(f"Unknown file format '{dst_format}'")
    if compress and dst_format != "qcow2":
        raise ValueError("Compression not supported for this file format")
    if compress and preallocation != "off":
        raise ValueError("Compression and preallocation not supported at the same time")
    if compression_type not in COMPRESSION_TYPES:
        raise ValueError(f"Parameter 'compression-type' does not accept value '{compression_type}'")
    if sparse_size % SECTOR or not 0 <= sparse_size <= 16 << 20:
        raise ValueError(f"sparse size {sparse_size} is not a multiple of 512 up to 16777216")
    if threads is not None and not 1 <= threads <= 64:
        raise ValueError(f"threads is {threads}: it must be between 1 and 64")


def _open_source(stack: ExitStack, src: Any, format: str | None, **options: Any) -> Any:
    several = isinstance(src, Sequence) and not isinstance(src, (str, bytes))
    parts = []
    for part in src if several else [src]:
        disk, owned = open_disk(part, format, **options)
        if owned:
            stack.callback(disk.close)
        parts.append(disk)
    if not parts:
        raise ValueError("no source is given")
    return parts[0] if len(parts) == 1 else ConcatDisk(parts)


def _open_existing(
    stack: ExitStack, dst: Any, format: str, cache: str, references: Any, lock: bool
) -> Any:
    if is_disk(dst):
        return dst
    target, _ = open_disk(dst, format, mode="r+", cache=cache, references=references, lock=lock)
    stack.callback(target.close)
    return target


def _create_image(
    stack: ExitStack,
    path: Any,
    size: int,
    cache: str,
    references: Any,
    backing_file: str | None,
    options: dict[str, Any],
) -> Any:
    import qcow2x

    qcow2x.create(path, size, **options)
    policy = _allow_only(backing_file, references)
    image = qcow2x.open(path, "r+", cache=cache, references=policy)
    stack.callback(image.close)
    return image


def _allow_only(backing_file: str | None, references: Any) -> Any:
    """The policy for opening the new target: the caller named its backing file, nothing else."""
    if backing_file is None or references == "follow" or callable(references):
        return references
    return lambda reference: reference.path if reference.name == backing_file else None


def _refuse_own_source(source: Any, dst: Any) -> None:
    """Raise ValueError if *dst* is one of the files that are being read."""
    try:
        there = os.stat(dst)
    except FileNotFoundError:
        return
    layers = [source, *getattr(source, "backing_chain", ())]
    for layer in layers:
        name = getattr(layer, "path", None) or getattr(layer, "name", None)
        try:
            same = name is not None and os.path.samestat(os.stat(name), there)
        except (OSError, TypeError, ValueError):
            continue
        if same:
            raise ValueError(f"{os.fsdecode(dst)}: the target is one of the files to read from")


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


class _Job:
    """One conversion in progress: plans tasks, does their heavy part, writes them in order."""

    def __init__(
        self,
        *,
        source: Any,
        target: Any,
        size: int,
        compress: bool,
        compression_type: str,
        level: int,
        sparse_size: int,
        keep_lower: bool,
        reads_zero: bool,
        progress: Progress | None,
    ) -> None:
        from qcow2x._core import bulk

        self.bulk = bulk
        self.source = source
        self.target = target
        self.size = size
        self.compress = compress
        self.type = COMPRESSION_TYPES[compression_type]
        self.level = level
        self.keep_lower = keep_lower
        self.reads_zero = reads_zero
        self.progress = progress
        self.is_raw = isinstance(target, RawDisk)

        if compress:
            info = target.info()
            self.type = COMPRESSION_TYPES[info.compression_type]
            low, high = bulk.level_range(self.type)
            if level and not low <= level <= high:
                raise ValueError(
                    f"level {level} is not between {low} and {high} for {info.compression_type}"
                )
        #: Zero detection and the edges of writes go by this unit.
        self.grain = 4096 if self.is_raw else self._target_grain()
        self.sparse_size = sparse_size
        if self.is_raw and 0 < sparse_size < self.grain:
            self.grain = SECTOR
        unit = max(self.grain, getattr(target, "cluster_size", 1))
        #: Tasks are cut on multiples of this, so that no cluster is decoded for two of them.
        self.cut = max(unit, getattr(source, "cluster_size", 1) or 1)
        self.task_bytes = max(TASK_BYTES, self.cut)
        self.min_zero = min(max(sparse_size, self.grain), self.task_bytes)

        self.counters = threading.Lock()
        self.done = 0
        self.data_bytes = 0
        self.zero_bytes = 0
        self.compressed_bytes = 0

    def _target_grain(self) -> int:
        cluster = int(self.target.cluster_size)
        if self.compress:
            return cluster
        return cluster // 32 if self.target.info().extended_l2 else cluster

    def run(self, threads: int) -> None:
        memory = self.task_bytes * (2 if self.compress else 1)
        budget = MEMORY_BASE + MEMORY_PER_THREAD * threads
        n_slots = max(1, min(2 * threads, budget // memory))
        slots = [_Slot(self.task_bytes, self.compress) for _ in range(n_slots)]
        # A raw target has a place for every byte; only an image's layout depends on the order.
        pipeline = Pipeline(
            self.tasks(),
            self.process,
            self.finish,
            slots,
            min(threads, n_slots),
            in_order=not self.is_raw,
        )
        self.report(0)
        pipeline.run(lambda: self.report(self.done))
        self.report(self.size)

    def report(self, done: int) -> None:
        if self.progress is not None and self.progress(done, self.size, "convert") is False:
            raise Cancelled("conversion cancelled; the target was not made")

    def result(self, dst: Any, size: int) -> ConvertResult:
        try:
            actual = os.stat(dst).st_blocks * 512
        except (OSError, TypeError):
            actual = 0
        return ConvertResult(
            size=size,
            data_bytes=self.data_bytes,
            compressed_bytes=self.compressed_bytes if self.compress else None,
            zero_bytes=self.zero_bytes,
            actual_size=actual,
        )

    # Planning: from the source's metadata alone.

    def kind_of(self, extent: Extent) -> str:
        if self.keep_lower and (extent.depth > 0 or not extent.allocated):
            return KEEP
        if self.sparse_size and (extent.zero or not extent.data):
            return ZERO
        return DATA

    def extents(self) -> Iterator[Extent]:
        """Those of the source, and a zero one for what is left of its last sector."""
        yield from extents_of(self.source)
        end = self.source.size
        if end < self.size:
            yield Extent(end, self.size - end, False, True, False, 0, None, None)

    def tasks(self) -> Iterator[list[Run]]:
        """The work in order. Zero runs that need no write are only counted."""
        task: list[Run] = []
        room = self.task_bytes
        for kind, start, end in plan_runs(self.extents(), self.size, self.grain, self.kind_of):
            if kind == KEEP or (kind == ZERO and self.reads_zero):
                self.count(end - start, zero=end - start if kind == ZERO else 0)
                continue
            if kind == ZERO:
                if task:
                    yield task
                    task, room = [], self.task_bytes
                for at in range(start, end, ZERO_PIECE):
                    yield [(ZERO, at, min(ZERO_PIECE, end - at))]
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

    def process(self, task: list[Run], slot: _Slot) -> list[tuple[Any, ...]]:
        """Read a task, find its zeros, compress it; returns what ``finish`` has to write."""
        writes: list[tuple[Any, ...]] = []
        at = used = 0
        for kind, offset, length in task:
            if kind == ZERO:
                writes.append((ZERO, offset, length))
                continue
            padded = -(-length // self.grain) * self.grain
            view = slot.raw[at : at + padded]
            at += padded
            read_padded(self.source, view[:length], offset)
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
                    ("packed", offset + start, view[start : start + run], room[:size], sizes)
                )
        return writes

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

    def finish(self, writes: list[tuple[Any, ...]]) -> None:
        done = data = zero = packed_bytes = 0
        for kind, offset, what, *packed in writes:
            if kind == ZERO:
                if not self.reads_zero:
                    self.target.write_zeroes(offset, what, unmap=True)
                done += what
                zero += what
                continue
            if kind == DATA:
                self.target.pwrite(what, offset)
            else:
                self.target.write_compressed_batch(packed[0], packed[1], what, offset)
                packed_bytes += len(packed[0])
            done += len(what)
            data += len(what)
        self.count(done, data=data, zero=zero, packed=packed_bytes)

    def count(self, done: int, *, data: int = 0, zero: int = 0, packed: int = 0) -> None:
        with self.counters:
            self.done += done
            self.data_bytes += data
            self.zero_bytes += zero
            self.compressed_bytes += packed
