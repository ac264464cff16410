"""Where bytes live: a regular file, a block device, a descriptor, or any Python object."""

from __future__ import annotations

import os

from qcow2x._core.opening import CACHE_MODES, check_mode
from qcow2x._core.pystorage import PyStorage
from qcow2x._core.storage import FileStorage, Storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    from qcow2x._protocols import Readable

__all__ = [
    "CACHE_MODES",
    "FileStorage",
    "PyStorage",
    "Source",
    "Storage",
    "open_storage",
]


#: A path, a file descriptor, a storage, or an object that can be one.
Source: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes] | int | Storage | Readable"


def open_storage(source: Source, *, writable: bool = False, cache: str = "writeback") -> Storage:
    """The storage behind ``source``.

    A path is opened, a file descriptor duplicated (the caller's own stays open), an object with
    ``size`` and ``pread`` wrapped. A Storage comes back as it is, in the cache mode it has; it must
    be writable if that is asked for.

    Raises ValueError or TypeError for what cannot be a source, OSError where the file cannot be
    opened (FileNotFoundError, PermissionError, IsADirectoryError, else StorageError).
    """
    check_mode(cache)
    if isinstance(source, Storage):
        if writable and not source.writable:
            raise PermissionError(f"{source.name}: is open read-only and cannot be written")
        return source
    if isinstance(source, bool):
        raise TypeError("a bool is not a path or file descriptor")
    if isinstance(source, int):
        return FileStorage(source, writable, cache)
    if isinstance(source, (str, bytes, os.PathLike)):
        path = os.fspath(source)
        if not path:
            raise ValueError("the path is empty")
        if ("\0" if isinstance(path, str) else b"\0") in path:  # type: ignore[operator]
            raise ValueError(f"the path {os.fsdecode(path)!r} contains a NUL character")
        return FileStorage(path, writable, cache)
    if callable(getattr(source, "pread", None)):
        return PyStorage(source, writable, cache)
    raise TypeError(
        f"{type(source).__name__} is neither a path, a file descriptor, a Storage nor an object "
        "with size() and pread(length, offset)"
    )
