"""Another backing file for an image: ``qemu-img rebase`` as a function."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import qcow2x
from qcow2x import backing as _backing
from qcow2x._core.image import CoreImage
from qcow2x.errors import Cancelled, Qcow2Error
from qcow2x.ops.copyjob import COMPRESSION_TYPES, MEMORY_BASE, TASK_BYTES, locate
from qcow2x.ops.disk import RawDisk, extents_of, image_of, open_disk, read_padded
from qcow2x.ops.newbacking import change_backing_file
from qcow2x.ops.pipeline import Pipeline, usable_cpus
from qcow2x.types import Progress

if TYPE_CHECKING:
    from qcow2x.image import Image

__all__ = ["RebaseResult", "rebase", "rebase_layers"]

MAX_THREADS = 8
_UNALLOCATED = 0  # a run that shows what is below, as include/qcow2x/plan.h has it

#: One write: (offset, bytes of data, compressed clusters and their sizes or None); the data may be a
#: number, of zeros.
_Write = tuple[int, "memoryview | int", "tuple[memoryview, Any] | None"]


@dataclass(frozen=True, slots=True)
class RebaseResult:
    """What a rebase wrote into the image so that it reads the same; in bytes of the guest disk."""

    data_bytes: int = 0
    zero_bytes: int = 0


def rebase(
    source: Any,
    backing_file: str | os.PathLike[str] | None,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    compress: bool = False,
    level: int = 0,
    detect_zeroes: bool = True,
    references: Any = "deny",
    key: Any = None,
    cache: str = "writeback",
    src_cache: str = "writeback",
    threads: int | None = None,
    lock: bool = True,
    progress: Progress | None = None,
) -> RebaseResult:
    """Gives the image *source* another backing file, or none; the disk reads as it did.

    *source* is a path, or what else :func:`qcow2x.open` takes, but no open image. *backing_file* is
    written into it as it is; a relative name counts from the folder of *source*. It has to be in
    *backing_format*, ``"qcow2"`` or ``"raw"``. What *source* itself does not hold is compared in
    the old and the new backing file, and where they differ the old content is written into
    *source*, with *compress* as compressed clusters (of *level*, or 0 for the usual one). Zeros take
    no room there; without *detect_zeroes* those that the old backing file had a place for do. If
    the new backing file is further down the old chain already, only what the layers between hold
    is looked at. With *unsafe* nothing is looked at, and no backing file opened: right where a file
    was moved, or for one that reads the same.

    ``references`` has to allow the old and the new layers to be opened (see :func:`qcow2x.open`),
    but for the new backing file itself, which the caller names; a callable is asked for that, too,
    and may say where it is. ``key`` is for all encrypted
    layers. ``progress(done, total, phase)`` gets bytes; returning False raises Cancelled, and the
    old backing file stays. So it does after a cut of power, but for the very last write, of one
    sector. Durable at return.

    Raises ValueError for a backing file without a format, HeaderFull where the name does not fit,
    CorruptImage where *source* would be below itself, and what opening, reading and writing raise.
    """
    name = None if not backing_file else os.fsdecode(backing_file)
    if name is not None and not backing_format:
        raise ValueError("backing format must be specified")
    common: dict[str, Any] = {"references": references, "lock": lock}
    if key is not None:
        # As a callable: a plain key would be refused by a chain in which nothing is encrypted.
        common["key"] = key if callable(key) or isinstance(key, dict) else lambda name: key
    with ExitStack() as stack:
        image = stack.enter_context(
            qcow2x.open(source, "r+", cache=cache, backing=False if unsafe else None, **common)
        )
        result = RebaseResult()
        if not unsafe:
            new, shared = None, None
            if name is not None:
                new, shared = _new_backing(
                    stack, image, name, backing_format, {**common, "cache": src_cache}
                )
            result = rebase_layers(
                image,
                new,
                shared,
                compress=compress,
                level=level,
                detect_zeroes=detect_zeroes,
                threads=threads,
                progress=progress,
            )
        change_backing_file(image, name, None if name is None else backing_format)
        return result


def _new_backing(
    stack: ExitStack, image: Image, name: str, format: str | None, options: dict[str, Any]
) -> tuple[Any, int | None]:
    """The new backing file as a disk, and its number in the chain if it is there already."""
    reference = _backing.reference_to("backing", name, format, image.name)
    format = _backing.check_format(reference)
    policy = options["references"]
    path = _backing.resolve(reference, policy if callable(policy) else "follow")
    for depth, layer in enumerate(image.backing_chain):
        if _is_file(layer, path):
            if depth == 0:
                raise _below_itself(image)
            return layer if image_of(layer) is not None else RawDisk(layer), depth
    disk, _ = open_disk(path, format, **options)
    stack.callback(disk.close)
    for layer in getattr(disk, "backing_chain", ()):
        if _is_file(layer, image.name):
            raise _below_itself(image)
    return disk, None


def _is_file(layer: Any, path: Any) -> bool:
    storage = getattr(layer, "_file", layer)
    try:
        return os.path.samestat(os.fstat(storage.fileno()), os.stat(path))
    except (AttributeError, OSError, TypeError):
        # One of them is no file: an object, which nothing else can be known of.
        return False


def _below_itself(image: Image) -> Exception:
    exc = qcow2x.CorruptImage(f"{image.name}: would be part of its own backing chain")
    exc.path = image.name
    return exc


def rebase_layers(
    image: Image,
    new: Any,
    shared: int | None = None,
    *,
    compress: bool = False,
    level: int = 0,
    detect_zeroes: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RebaseResult:
    """Writes into *image* all that it would not show with *new*, an open disk or None, below it.
    *shared* says that *new* is what number *shared* of ``image.backing_chain`` reads from. Durable
    at return; the header is not touched."""
    job = _RebaseJob(image, new, shared, compress, level, detect_zeroes, progress)
    job.run(threads or min(usable_cpus(), MAX_THREADS))
    image.flush()
    return RebaseResult(job.data_bytes, job.zero_bytes)


class _Slot:
    """The memory of one task in flight."""

    def __init__(self, nbytes: int, compress: bool) -> None:
        self.old = memoryview(mmap.mmap(-1, nbytes))
        self.new = memoryview(mmap.mmap(-1, nbytes))
        self.packed = memoryview(mmap.mmap(-1, nbytes if compress else 1))


class _Task(NamedTuple):
    offset: int
    length: int


class _RebaseJob:
    """One rebase in progress. What the image does not hold is read through it: that is the old
    backing file, with zeros where it is too short."""

    def __init__(
        self,
        image: Image,
        new: Any,
        shared: int | None,
        compress: bool,
        level: int,
        detect_zeroes: bool,
        progress: Progress | None,
    ) -> None:
        from qcow2x._core import bulk

        self.bulk = bulk
        self.image = image
        self.new = new
        self.shared = shared
        self.compress = compress
        self.level = level
        self.progress = progress
        self.size = image.size
        info = image.info()
        self.type = COMPRESSION_TYPES[info.compression_type]
        self.cluster = image.cluster_size
        #: What is compared, and written as a whole: the least that the image maps on its own.
        self.grain = self.cluster // 32 if info.extended_l2 and not compress else self.cluster
        #: From here on zeros are looked for in old content.
        self.zeros_from = 0
        if not detect_zeroes and image.backing is not None:
            below = image.backing
            self.zeros_from = below.size if isinstance(below, CoreImage) else below.size()
        self.task_bytes = max(TASK_BYTES, self.cluster)
        self.done = self.data_bytes = self.zero_bytes = 0

    def run(self, threads: int) -> None:
        memory = self.task_bytes * (3 if self.compress else 2)
        n_slots = max(1, min(2 * threads, MEMORY_BASE // memory))
        slots = [_Slot(self.task_bytes, self.compress) for _ in range(n_slots)]
        self.report()
        Pipeline(self.tasks(), self.process, self.finish, slots, min(threads, n_slots)).run(
            self.report
        )
        self.done = self.size
        self.report()

    def report(self) -> None:
        if self.progress is not None and self.progress(self.done, self.size, "rebase") is False:
            raise Cancelled("rebase cancelled; the image has its old backing file")

    # What may have to be written: from metadata alone.

    def tasks(self) -> Iterator[_Task]:
        for start, end in self.unallocated():
            covered = start
            for low, high in self.in_doubt(start, end):
                low = max(covered, low - low % self.grain)
                high = min(end, -(-high // self.grain) * self.grain)
                while low < high:
                    # Cut on multiples of a cluster.
                    stop = min(high, low - low % self.cluster + self.task_bytes)
                    yield _Task(low, stop - low)
                    low = stop
                covered = max(covered, high)

    def unallocated(self) -> Iterator[tuple[int, int]]:
        """What the image's own layer leaves to the next one."""
        at = 0
        while at < self.size:
            for offset, nbytes, kind, _ in self.image._plan(at, self.size - at):
                at = offset + nbytes
                if kind == _UNALLOCATED:
                    yield offset, at

    def in_doubt(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that the metadata does not call the same in both backing files."""
        for run in self.image.extents(start, end - start, layers=self.shared):
            if run.depth == self.shared:
                continue
            low, high = run.offset, run.offset + run.length
            if run.data and not run.zero:
                yield low, high
            elif self.new is not None:
                high = min(high, self.new.size)
                if low < high:
                    for other in extents_of(self.new, low, high - low):
                        if other.data and not other.zero:
                            yield other.offset, other.offset + other.length

    # Comparing: any thread, any order.

    def process(self, task: _Task, slot: _Slot) -> tuple[int, list[_Write]]:
        offset, length = task
        old = slot.old[: -(-length // self.grain) * self.grain]
        try:
            read_padded(self.image, old[:length], offset)
        except (OSError, Qcow2Error) as exc:
            locate(exc, "reading from old backing file", offset)
            raise
        self.bulk.fill_zero(old[length:])
        new = slot.new[: len(old)]
        if self.new is None:
            self.bulk.fill_zero(new)
        else:
            try:
                read_padded(self.new, new, offset)
            except (OSError, Qcow2Error) as exc:
                locate(exc, "reading from new backing file", offset)
                raise
            # What lies past the image's own end is nobody's.
            self.bulk.fill_zero(new[length:])
        writes: list[_Write] = []
        packed = 0
        for start, stop in self.differing(old, new):
            packed = self.plan_writes(offset, length, old, start, stop, slot, packed, writes)
        return offset + length, writes

    def differing(self, old: memoryview, new: memoryview) -> Iterator[tuple[int, int]]:
        """The runs of whole grains that are not the same."""
        at = 0
        while at < len(old):
            first = self.bulk.first_difference(old[at:], new[at:])
            if first is None:
                return
            start = (at + first) // self.grain * self.grain
            at = start + self.grain
            while at < len(old) and (
                self.bulk.first_difference(old[at : at + self.grain], new[at : at + self.grain])
                is not None
            ):
                at += self.grain
            yield start, min(at, len(old))

    def plan_writes(
        self,
        offset: int,
        length: int,
        old: memoryview,
        start: int,
        stop: int,
        slot: _Slot,
        packed: int,
        writes: list[_Write],
    ) -> int:
        """Adds the writes of one run of old content; returns how much of the slot's memory for
        compressed clusters is in use."""
        end = start
        for low, nbytes in self.data_runs(offset, old, start, stop):
            if low > end:
                writes.append((offset + end, low - end, None))
            end = low + nbytes
            data = old[low : min(end, length)]
            if not self.compress or not self.fills_clusters(offset + low, len(data)):
                writes.append((offset + low, data, None))
                continue
            room = slot.packed[packed : packed + nbytes]
            size, sizes = self.bulk.compress_batch(
                old[low:end], self.cluster, self.type, self.level, room
            )
            writes.append((offset + low, data, (room[:size], sizes)))
            packed += size
        if end < min(stop, length):
            writes.append((offset + end, min(stop, length) - end, None))
        return packed

    def data_runs(
        self, offset: int, old: memoryview, start: int, stop: int
    ) -> Iterator[tuple[int, int]]:
        """Start and length of what is to be stored as data."""
        kept = -(-max(0, self.zeros_from - offset) // self.grain) * self.grain
        if start < kept:
            yield start, min(stop, kept) - start
            start = min(stop, kept)
        for low, nbytes in self.bulk.data_runs(old[start:stop], self.grain, self.grain):
            yield start + low, nbytes

    def fills_clusters(self, offset: int, nbytes: int) -> bool:
        end = offset + nbytes
        return offset % self.cluster == 0 and (end % self.cluster == 0 or end == self.size)

    # The writes, in the order of the disk.

    def finish(self, result: tuple[int, list[_Write]]) -> None:
        done, writes = result
        for offset, data, packed in writes:
            try:
                self.write(offset, data, packed)
            except (OSError, Qcow2Error) as exc:
                locate(exc, "writing", offset)
                raise
        self.done = done

    def write(
        self, offset: int, data: memoryview | int, packed: tuple[memoryview, Any] | None
    ) -> None:
        if isinstance(data, int):
            self.image.write_zeroes(offset, data)
            self.zero_bytes += data
            return
        if packed is None:
            self.image.pwrite(data, offset)
        else:
            self.image.write_compressed_batch(packed[0], packed[1], data, offset)
        self.data_bytes += len(data)
