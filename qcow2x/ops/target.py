"""A new file that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any


class NewFile:
    """Writes go to a temporary name in the target's folder; :meth:`commit` renames it into place.

    A context manager: left without ``commit`` (an error, Cancelled, a signal's exception) it
    removes the temporary file, and an existing target stays as it was. The new file has the mode
    bits of the target it replaces, or those the umask gives. A symbolic link is followed, so that
    the file it points to is replaced, not the link.

    Raises OSError, and ImageLocked if *lock* is set and another program has the file in use: it
    would go on with the old file, unseen.
    """

    def __init__(self, path: Any, *, lock: bool = True) -> None:
        self._old: Any = None
        self.target = os.path.realpath(os.fsdecode(path))
        self.folder = os.path.dirname(self.target)
        mode = None
        try:
            status = os.stat(self.target)
        except FileNotFoundError:
            pass
        else:
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.target)
            # A rename would replace a file that the user may not even write to.
            if not os.access(self.target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.target)
            mode = stat.S_IMODE(status.st_mode)
            if lock:
                from qcow2x.ops.disk import RawDisk

                self._old = RawDisk(self.target, "r+", lock=True)
        self.path = os.path.join(self.folder, f".qcow2x-{os.urandom(8).hex()}.tmp")
        try:
            fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
            try:
                if mode is not None:
                    os.fchmod(fd, mode)
            finally:
                os.close(fd)
        except OSError as exc:
            self.discard()
            # The user never asked for the temporary name: speak of the one they did.
            raise OSError(exc.errno, exc.strerror, os.fsdecode(path)) from None
        except BaseException:
            self.discard()
            raise

    def commit(self, *, sync: bool = True) -> None:
        """Put the file in place, durably unless *sync* is false."""
        if sync:
            _sync(self.path, os.O_RDWR)
        os.rename(self.path, self.target)
        self.path = ""
        self._release()
        if sync:
            _sync(self.folder, os.O_RDONLY | os.O_DIRECTORY)

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        if self.path:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass
            self.path = ""
        self._release()

    def _release(self) -> None:
        if self._old is not None:
            self._old.close()
            self._old = None

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()


def _sync(path: str, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_path(target: Any) -> bool:
    return isinstance(target, (str, bytes, os.PathLike))


def is_device(target: Any) -> bool:
    """Whether *target* is the path of something that is there and no regular file."""
    try:
        return is_path(target) and not stat.S_ISREG(os.stat(target).st_mode)
    except FileNotFoundError:
        return False
