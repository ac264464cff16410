"""How a file gets its descriptor: what is refused at the door, and with which words."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from qcow2x.errors import StorageError

#: QEMU's names with QEMU's meaning; see :class:`qcow2x.storage.FileStorage`.
CACHE_MODES = ("writeback", "none", "writethrough", "directsync", "unsafe")

_DIRECT_MODES = ("none", "directsync")
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a character device", stat.S_IFSOCK: "a socket"}


def storage_error(number: int, name: str, what: str) -> StorageError:
    """A StorageError that names the file."""
    exc = StorageError(number, f"{name}: {what}")
    exc.path = name
    return exc


def refuse_kind(kind: int, name: str) -> OSError:
    """What to say of something that is neither a regular file nor a block device."""
    if kind == stat.S_IFDIR:
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    return storage_error(
        errno.EINVAL,
        name,
        f"is {_KINDS.get(kind, 'no file')}; an image lives in a regular file or a block device",
    )


def check_mode(cache: str) -> None:
    """ValueError unless ``cache`` is one of CACHE_MODES."""
    if cache not in CACHE_MODES:
        raise ValueError(f"cache mode {cache!r} is not one of {', '.join(CACHE_MODES)}")


def uses_direct(cache: str) -> bool:
    """Whether the cache mode goes past the page cache."""
    return cache in _DIRECT_MODES


def open_path(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    writable: bool,
    cache: str,
    create: bool,
    exclusive: bool,
) -> int:
    """A descriptor for a path; OSError as ``open`` gives it."""
    # O_NONBLOCK: a FIFO without a peer must be refused, not waited for.
    flags = os.O_RDWR if writable else os.O_RDONLY
    flags |= os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    if create or exclusive:
        flags |= os.O_CREAT
    if exclusive:
        flags |= os.O_EXCL
    fd = _open_maybe_direct(path, flags, cache, os.fsdecode(path))
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return fd


def adopt_descriptor(fd: int, writable: bool, cache: str, name: str) -> int:
    """A descriptor of our own for one handed in, after a look at what that one allows."""
    if fd < 0:
        raise ValueError(f"file descriptor {fd} is negative")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    access = flags & os.O_ACCMODE
    if flags & os.O_PATH:
        raise storage_error(errno.EBADF, name, "was opened O_PATH and cannot be read")
    if access == os.O_WRONLY:
        raise PermissionError(errno.EACCES, f"{name}: is open write-only; an image must be read")
    if writable and access != os.O_RDWR:
        raise PermissionError(errno.EACCES, f"{name}: is open read-only and cannot be written")
    if writable and flags & os.O_APPEND:
        # Linux ignores the offset of pwrite on such a descriptor.
        raise storage_error(
            errno.EINVAL, name, "is open for appending; every write would go to the end"
        )
    if not uses_direct(cache) or flags & os.O_DIRECT:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    # O_DIRECT belongs to the open file, not to its number: set on a duplicate, the caller would
    # find it on its own.
    return _open_maybe_direct(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC, cache, name)


def open_past_cache(fd: int) -> int:
    """The file of ``fd``, opened once more for reading and writing past the page cache; -1 where it cannot be."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return -1


def is_direct(fd: int) -> bool:
    """Whether the descriptor was opened O_DIRECT, by us or by who handed it in."""
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def _open_maybe_direct(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes], flags: int, cache: str, name: str
) -> int:
    direct = uses_direct(cache)
    try:
        return os.open(path, flags | (os.O_DIRECT if direct else 0), 0o666)
    except OSError as exc:
        # A directory refuses O_DIRECT as well, but that is not what is wrong with it.
        if direct and exc.errno == errno.EINVAL and not os.path.isdir(path):
            raise storage_error(
                errno.EINVAL,
                name,
                f"cache mode {cache!r} needs O_DIRECT, which this file system refuses; "
                "use 'writeback' or 'writethrough'",
            ) from None
        if exc.errno == errno.EINVAL and os.path.isdir(path):
            raise refuse_kind(stat.S_IFDIR, name) from None
        raise
