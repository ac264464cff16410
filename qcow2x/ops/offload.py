"""Copying inside the kernel: from file to file, without the bytes passing through this process."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from typing import Any

from qcow2x.ops.disk import image_of
from qcow2x.storage import FileStorage, Storage

#: What says that these two files cannot be copied so, where reading and writing still can.
_NOT_SO = frozenset(
    (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)
    + (errno.EIO, errno.ETXTBSY)
)


def plain_file(disk: Any) -> int | None:
    """The descriptor of the file whose bytes are those of *disk*, or None if there is none."""
    if image_of(disk) is not None:
        return None
    storage = getattr(disk, "storage", None) or getattr(disk, "_storage", None)
    return storage.fileno() if isinstance(storage, FileStorage) else None


def is_in_page_cache(disk: Any) -> bool:
    """Whether *disk* is a plain file that is written through the page cache."""
    fd = plain_file(disk)
    return fd is not None and not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT


def copy_range(source: Any, offset: int, length: int, target: Any) -> bool:
    """Copies bytes of the disk *source* to the same place of the disk *target*; False where that
    cannot be done here. Part of them may have been copied then."""
    out = plain_file(target)
    if out is None:
        return False
    for fd, at, start, nbytes in _pieces(source, offset, length):
        if fd is None or not _copy(fd, at, out, start, nbytes):
            return False
    return True


def _pieces(source: Any, offset: int, length: int) -> Iterator[tuple[int | None, int, int, int]]:
    """Where the bytes are: ``(descriptor, offset there, offset on the disk, length)``."""
    layers = getattr(source, "backing_chain", None) or [source]
    for run in source.extents(offset, length):
        fd = None
        if run.data and run.host_offset is not None and run.depth < len(layers):
            fd = _data_descriptor(layers[run.depth])
        yield fd, run.host_offset or 0, run.offset, run.length


def _data_descriptor(layer: Any) -> int | None:
    image = image_of(layer)
    if image is None:
        return layer.fileno() if isinstance(layer, FileStorage) else plain_file(layer)
    if image.info().encryption is not None:
        return None
    data: Storage = image._data
    return data.fileno() if isinstance(data, FileStorage) else None


def _copy(fd: int, at: int, out: int, start: int, nbytes: int) -> bool:
    while nbytes:
        try:
            done = os.copy_file_range(fd, out, nbytes, at, start)
        except OSError as exc:
            if exc.errno in _NOT_SO:
                return False
            raise
        if not done:
            return False
        at, start, nbytes = at + done, start + done, nbytes - done
    return True
