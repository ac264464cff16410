"""Any disk seen one way: raw ones, qcow2 images, and several in a row.

What every operation needs of a source is small: ``size``, ``extents()``, ``preadinto()`` and
``close()``, as :class:`qcow2x.Image` has them. This module gives the same to everything else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from qcow2x.locking import lock_image
from qcow2x.types import Extent

QCOW2_MAGIC = b"QFI\xfb"
SECTOR = 512


class Disk(Protocol):
    """What operations read from."""

    @property
    def size(self) -> int: ...
    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]: ...
    def preadinto(self, buffer: Any, offset: int) -> int: ...
    def close(self) -> None: ...


class RawDisk:
    """A raw disk: a file, block device, descriptor or storage object. Any thread may use it.

    *source* is anything :func:`qcow2x.storage.open_storage` takes; an open storage stays open.
    *lock* takes part in QEMU's image locking. Raises OSError, ImageLocked and ValueError.
    """

    format = "raw"

    def __init__(
        self, source: Any, mode: str = "r", cache: str = "writeback", *, lock: bool = False
    ) -> None:
        from qcow2x.storage import Storage, open_storage

        writable = mode == "r+"
        self._owned = not isinstance(source, Storage)
        self._storage = open_storage(source, writable=writable, cache=cache)
        self._lock = None
        if lock:
            try:
                self._lock = lock_image(self._storage, writable)
            except BaseException:
                self.close()
                raise
        self.name: str = self._storage.name

    @property
    def size(self) -> int:
        """Size in bytes, asked afresh: a file may grow under its user."""
        return int(self._storage.size())

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Runs of data and holes, as the file system tells them apart."""
        end = self.size if length is None else min(self.size, offset + length)
        while offset < end:
            run, kind = self._storage.extent(offset, end - offset)
            if kind == "end":
                return
            zero = kind == "zero"
            yield Extent(offset, run, not zero, zero, False, 0, offset, self.name)
            offset += run

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self._storage.pread(length, offset))

    def preadinto(self, buffer: Any, offset: int) -> int:
        """Fill *buffer*; the count is short only at the end of the disk."""
        return int(self._storage.preadinto(buffer, offset))

    def pwrite(self, data: Any, offset: int) -> int:
        """Write all of *data*; raises ValueError past the end, which a write does not move."""
        nbytes = memoryview(data).nbytes
        if offset + nbytes > self.size:
            raise ValueError(f"{self.name}: {nbytes} bytes at {offset} reach past the disk's end")
        return int(self._storage.pwrite(data, offset))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make a range read as zeros, as a hole if *unmap*."""
        self._storage.zero(offset, length, may_unmap=unmap)

    def resize(self, size: int, *, shrink: bool = False, preallocation: str = "off") -> None:
        """Set the size in bytes; what is added reads as zeros. A device keeps its own size."""
        if preallocation not in ("off", "falloc", "full"):
            raise ValueError(f"preallocation {preallocation!r} is none of off, falloc, full")
        old = self.size
        if size < old and not shrink:
            raise ValueError(f"{self.name}: shrinking from {old} to {size} bytes needs shrink=True")
        self._storage.truncate(size)
        if size > old and preallocation == "falloc":
            self._storage.reserve(old, size - old)
        elif size > old and preallocation == "full":
            blank = memoryview(bytes(min(size - old, 1 << 20)))
            for at in range(old, size, 1 << 20):
                self._storage.pwrite(blank[: size - at], at)

    def flush(self) -> None:
        """Everything written before is durable afterwards (nothing is done in mode unsafe)."""
        self._storage.flush()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if self._owned:
            self._storage.close()

    def __enter__(self) -> RawDisk:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ConcatDisk:
    """Several disks one after another, each padded with zeros to a whole sector."""

    format = "concat"

    def __init__(self, parts: Sequence[Any]) -> None:
        #: What it is made of.
        self.layers = list(parts)
        self._parts: list[tuple[int, int, Any]] = []
        at = 0
        for part in parts:
            padded = -(-part.size // SECTOR) * SECTOR
            self._parts.append((at, padded, part))
            at += padded
        self._size = at
        self.cluster_size = max(getattr(part, "cluster_size", SECTOR) for part in parts)

    @property
    def size(self) -> int:
        return self._size

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        end = self._size if length is None else min(self._size, offset + length)
        for start, padded, part in self._parts:
            low, high = max(offset, start), min(end, start + padded)
            if low >= high:
                continue
            covered = low
            for run in extents_of(part, low - start, high - low):
                covered = start + run.offset + run.length
                yield run._replace(offset=start + run.offset)
            if covered < high:
                yield Extent(covered, high - covered, False, True, False, 0, None, None)

    def preadinto(self, buffer: Any, offset: int) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - offset))
        for start, padded, part in self._parts:
            low, high = max(offset, start), min(offset + wanted, start + padded)
            if low < high:
                read_padded(part, view[low - offset : high - offset], low - start)
        return wanted

    def close(self) -> None:
        for _, _, part in self._parts:
            part.close()


def extents_of(disk: Any, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
    """The extents of *disk*, with the holes of an image file that was laid out but never filled.

    Metadata preallocation maps every cluster to a place in a sparse file. Such places read as
    zeros: they come as runs that are both data and zero, as ``qemu-img map`` has them.
    """
    runs: Iterator[Extent] = disk.extents(offset, length)
    sparse = {
        layer.name: layer._file
        for layer in getattr(disk, "backing_chain", ())
        if hasattr(layer, "cluster_size") and _is_laid_out_ahead(layer)
    }
    return _split_at_holes(runs, sparse) if sparse else runs


def _is_laid_out_ahead(image: Any) -> bool:
    """Whether the file has fewer blocks than clusters by more than chance: by a tenth, as in QEMU.

    Asking the file system about every run of any other image would cost more than it saves. A hole
    under an encrypted cluster is no zeros to the guest.
    """
    if image._header.encryption is not None:
        return False
    try:
        status = os.fstat(image._file.fileno())
    except (AttributeError, OSError):
        return False
    used = status.st_blocks * 512 // image.cluster_size
    return bool(status.st_size // image.cluster_size >= max(used * 10 // 9, used + 2))


def _split_at_holes(runs: Iterator[Extent], sparse: dict[str, Any]) -> Iterator[Extent]:
    for run in runs:
        file = sparse.get(run.filename or "")
        if file is None or not run.data or run.zero or run.host_offset is None:
            yield run
            continue
        done = 0
        while done < run.length:
            host = run.host_offset + done
            nbytes, kind = file.extent(host, run.length - done)
            if kind == "end":
                nbytes = run.length - done
            yield run._replace(
                offset=run.offset + done, length=nbytes, host_offset=host, zero=kind != "data"
            )
            done += nbytes


def read_padded(disk: Any, view: memoryview, offset: int) -> None:
    """Fill *view* from *disk*; what lies past its end reads as zeros."""
    from qcow2x._core.bulk import fill_zero

    got = disk.preadinto(view, offset) if offset < disk.size else 0
    if got < len(view):
        fill_zero(view[got:])


def image_of(disk: Any) -> Any:
    """The qcow2 image that *disk* is, or shows as it is; None where it is none."""
    from qcow2x._core.image import CoreImage

    if isinstance(disk, CoreImage):
        return disk
    return getattr(disk, "image", None)


def names_under(disk: Any) -> Iterator[str]:
    """The names of all that a disk is read from."""
    todo = [disk]
    while todo:
        layer = todo.pop()
        name = getattr(layer, "path", None) or getattr(layer, "name", None)
        if isinstance(name, (str, bytes)):
            yield os.fsdecode(name)
        image = image_of(layer)
        if image is layer:
            todo += [image._data, *([] if image.backing is None else [image.backing])]
        todo += getattr(layer, "layers", ())
        todo += getattr(layer, "children", {}).values()


def is_disk(source: Any) -> bool:
    """Whether *source* is an open image (or anything that reads like one)."""
    return hasattr(source, "extents") and hasattr(source, "preadinto")


def probe_format(source: Any) -> str:
    """``"qcow2"`` or ``"raw"``, from the first four bytes of any source but an open image."""
    with RawDisk(source) as raw:
        return "qcow2" if raw.pread(4, 0) == QCOW2_MAGIC else "raw"


def open_disk(
    source: Any,
    format: str | None = None,
    *,
    mode: str = "r",
    cache: str = "writeback",
    **options: Any,
) -> tuple[Any, bool]:
    """Open *source* as a disk; returns it and whether the caller has to close it.

    *source* is an open image, a path, a descriptor or a storage object; *format* is ``"qcow2"``,
    ``"raw"``, ``"luks"`` or None to look at the first bytes, which takes a LUKS container for a raw
    disk. *options* go to :func:`qcow2x.open`.
    """
    if is_disk(source):
        return source, False
    if format is None:
        format = probe_format(source)
    if format == "qcow2":
        import qcow2x

        return qcow2x.open(source, mode, cache=cache, **options), True
    if format not in ("raw", "file", "luks"):
        raise ValueError(f"Unknown driver '{format}'")
    if options.get("snapshot") is not None:
        raise ValueError(f"a {format} disk has no snapshots")
    if format == "luks":
        from qcow2x.ops.luks import LuksFile

        lock = options.get("lock", True)
        return LuksFile(source, mode, cache, key=options.get("key"), lock=lock), True
    return RawDisk(source, mode, cache, lock=options.get("lock", True)), True
