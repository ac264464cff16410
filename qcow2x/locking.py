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
does not share *write* and *resize* either. Who reads but shares everything (``share``) only keeps
away from those who do not share *read*.
"""

from __future__ import annotations

import errno
import fcntl
import struct

from qcow2x.errors import ImageLocked
from qcow2x.storage import FileStorage, Storage

_HELD_BASE, _UNSHARED_BASE = 100, 200
_NAMES = {0: "consistent read", 1: "write", 3: "resize"}
_READ, _WRITE, _RESIZE = 0, 1, 3

# struct flock: type, whence, start, length, pid (0 for locks of an open file description).
_FLOCK = struct.Struct("@hhqqi4x")


class ImageLock:
    """The locks of one open image on one file. Released by release(), or with the descriptor."""

    def __init__(self, storage: FileStorage, writable: bool, share: bool = False) -> None:
        """Takes the locks, or raises ImageLocked and holds none."""
        self._fd = storage.fileno()
        self._bytes: list[int] = []
        used = (_READ, _WRITE, _RESIZE) if writable else (_READ,)
        unshared = () if share else (_WRITE, _RESIZE)
        try:
            for permission in used:
                self._hold(_HELD_BASE + permission)
            for permission in unshared:
                self._hold(_UNSHARED_BASE + permission)
            # Taken first and looked second: of two that start together at least one sees the other.
            for permission in used:
                if self._held_by_others(_UNSHARED_BASE + permission):
                    raise _conflict(storage, permission, shared=False)
            for permission in unshared:
                if self._held_by_others(_HELD_BASE + permission):
                    raise _conflict(storage, permission, shared=True)
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


def _conflict(storage: Storage, permission: int, shared: bool) -> ImageLocked:
    name = _NAMES[permission]
    what = f"has {name!r} access to it" if shared else f"does not share {name!r} access to it"
    exc = ImageLocked(
        errno.EAGAIN,
        f"{storage.name}: is in use: another program {what}; pass lock=False to open it all "
        "the same (what is read may then be stale)",
    )
    exc.path = storage.name
    exc.permission, exc.shared = name, shared
    return exc


def lock_image(storage: Storage, writable: bool, share: bool = False) -> ImageLock | None:
    """Locks the file under an image. None where there is nothing to lock: Python objects, and file
    systems that know no locks, which QEMU passes over as well."""
    if not isinstance(storage, FileStorage):
        return None
    try:
        return ImageLock(storage, writable, share)
    except ImageLocked:
        raise
    except OSError as exc:
        if exc.errno in (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        raise
