"""Image locks, the same as QEMU's, so that programs keep out of each other's way.

QEMU takes open-file-description locks on single bytes of the image file. What a user of the file
does with it ("permission") and what it will not let others do at the same time ("unshared") each
has a byte of its own; holding is a shared lock on the byte, and a conflict is found by looking
whether anybody else holds the opposite byte. The bytes lie inside the image, but locks do not touch
data. They end with the descriptor, at the latest with the process.

=============  =====================  =======================
permission     byte held by its user  byte held against it
=============  =====================  =======================
read           100                    200
write          101                    201
resize         103                    203
=============  =====================  =======================

A reader of an image uses *read* and does not share *write* and *resize*; a writer uses all three and
does not share *write* and *resize* either.
"""

from __future__ import annotations

import errno
import fcntl
import struct

from qcow2x.errors import ImageLocked
from qcow2x.storage import FileStorage, Storage

_HELD_BASE, _UNSHARED_BASE = 100, 200
_NAMES = {0: "read", 1: "write", 3: "resize"}
_READ, _WRITE, _RESIZE = 0, 1, 3

# struct flock: type, whence, start, length, pid (0 for locks of an open file description).
_FLOCK = struct.Struct("@hhqqi4x")


class ImageLock:
    """The locks of one open image on one file. Released by release(), or with the descriptor."""

    def __init__(self, storage: FileStorage, writable: bool) -> None:
        """Takes the locks, or raises ImageLocked and holds none."""
        self._fd = storage.fileno()
        self._bytes: list[int] = []
        used = (_READ, _WRITE, _RESIZE) if writable else (_READ,)
        unshared = (_WRITE, _RESIZE)
        try:
            for permission in used:
                self._hold(_HELD_BASE + permission)
            for permission in unshared:
                self._hold(_UNSHARED_BASE + permission)
            # Taken first and looked second: of two that start together at least one sees the other.
            for permission in used:
                if self._held_by_others(_UNSHARED_BASE + permission):
                    raise _conflict(storage, f"does not share {_NAMES[permission]!r} access to it")
            for permission in unshared:
                if self._held_by_others(_HELD_BASE + permission):
                    raise _conflict(storage, f"has {_NAMES[permission]!r} access to it")
        except BaseException:
            self.release()
            raise

    def _hold(self, byte: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
        self._bytes.append(byte)

    def _held_by_others(self, byte: int) -> bool:
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def release(self) -> None:
        """Gives the locks back; a descriptor handed in by the caller may live on without them."""
        held, self._bytes = self._bytes, []
        for byte in held:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, byte, 1, 0))


def _conflict(storage: Storage, what: str) -> ImageLocked:
    exc = ImageLocked(
        errno.EAGAIN,
        f"{storage.name}: is in use: another program {what}; pass lock=False to open it all "
        "the same (what is read may then be stale)",
    )
    exc.path = storage.name
    return exc


def lock_image(storage: Storage, writable: bool) -> ImageLock | None:
    """Locks the file under an image. None where there is nothing to lock: Python objects, and file
    systems that know no locks, which QEMU passes over as well."""
    if not isinstance(storage, FileStorage):
        return None
    try:
        return ImageLock(storage, writable)
    except ImageLocked:
        raise
    except OSError as exc:
        if exc.errno in (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        raise
