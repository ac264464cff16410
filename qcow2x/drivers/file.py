"""``file`` and ``host_device``: the bottom of most graphs."""

from __future__ import annotations

import errno
import os
import stat

from qcow2x.drivers import naming
from qcow2x.drivers import options as opts
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.node import Node
from qcow2x.drivers.options import Options
from qcow2x.locking import ImageLock, lock_image
from qcow2x.storage import FileStorage, PyStorage, Storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar


class FileNode(Node):
    """A regular file. Takes part in QEMU's image locking, unless ``locking=off``."""

    driver = "file"
    is_protocol = True
    needs_filename = True
    prefix: ClassVar[str] = "file:"
    _lock: ImageLock | None = None

    @classmethod
    def parse_filename(cls, filename: str, options: Options) -> None:
        path = filename.removeprefix(cls.prefix)
        if path != filename and naming.has_protocol(path):
            # It must not look as if it began with another protocol.
            path = f"./{path}"
        options["filename"] = path

    def open(self, options: Options) -> None:
        path = opts.take_text(options, "filename") or ""
        locking = opts.take_text(options, "locking") or "auto"
        aio = opts.take_text(options, "aio") or self.graph.aio
        for value, allowed in (
            (locking, ("auto", "on", "off")),
            (aio, ("threads", "native", "io_uring")),
        ):
            if value not in allowed:
                raise OptionError(f"invalid parameter value: {value}")
        # Hints about how QEMU does its I/O: taken, as they change no byte.
        opts.take_number(options, "aio-max-batch")
        opts.take_bool(options, "drop-cache")
        opts.take_bool(options, "x-check-cache-dropped")
        if aio == "native" and not self.graph.is_direct(self.options):
            raise OptionError(
                "aio=native was specified, but it requires cache.direct=on, which was not specified."
            )
        self._check_kind(path)
        try:
            self.storage = self._open_storage(path)
        except OSError as exc:
            if not self._may_be_read_only(exc):
                raise _cannot_open(path, exc) from None
            self.writable = False
            self.storage = self._open_storage(path)
        if locking != "off":
            self._lock = lock_image(
                self.storage, self.writable, share=self.graph.shares(self.options)
            )

    def _open_storage(self, path: str) -> Storage:
        return FileStorage(path, self.writable, self.graph.cache_mode(self.options))

    def _may_be_read_only(self, exc: OSError) -> bool:
        return (
            self.writable
            and self.graph.auto_read_only(self.options)
            and exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        )

    def _check_kind(self, path: str) -> None:
        mode = _mode_of(path)
        if mode is None:
            return
        if stat.S_ISDIR(mode) and self.writable:
            raise _cannot_open(path, OSError(errno.EISDIR, os.strerror(errno.EISDIR)))
        if not stat.S_ISREG(mode):
            raise OptionError(f"'{self.driver}' driver requires '{path}' to be a regular file")

    def _close(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self.storage.close()


class HostDeviceNode(FileNode):
    """A block device of the host, or a character device."""

    driver = "host_device"
    prefix = "host_device:"

    def _check_kind(self, path: str) -> None:
        mode = _mode_of(path)
        if mode is not None and stat.S_ISDIR(mode) and self.writable:
            raise _cannot_open(path, OSError(errno.EISDIR, os.strerror(errno.EISDIR)))
        if mode is not None and not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            raise OptionError(
                f"'{self.driver}' driver requires '{path}' to be either a character or block device"
            )

    def _open_storage(self, path: str) -> Storage:
        mode = _mode_of(path)
        if mode is None or not stat.S_ISCHR(mode):
            return super()._open_storage(path)
        return PyStorage(_CharacterDevice(path, self.writable), self.writable)


class HostCdromNode(HostDeviceNode):
    """A drive for optical discs."""

    driver = "host_cdrom"
    prefix = "host_cdrom:"


class _CharacterDevice:
    """A device that is read and written like a file, at the size that seeking to its end tells."""

    def __init__(self, path: str, writable: bool) -> None:
        self.name = path
        self._fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)

    def size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    def pread(self, length: int, offset: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def pwrite(self, data: bytes, offset: int) -> int:
        return os.pwrite(self._fd, data, offset)

    def flush(self) -> None:
        os.fsync(self._fd)

    def truncate(self, size: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def __del__(self) -> None:
        if (fd := getattr(self, "_fd", None)) is not None:
            os.close(fd)


def _mode_of(path: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):
        # Opening it says best what is wrong.
        return None


def _cannot_open(path: str, exc: OSError) -> OSError:
    """The error in the words in which QEMU's file driver says it."""
    if exc.errno is None or exc.filename is None and exc.errno != errno.EISDIR:
        return exc
    return OSError(exc.errno, os.strerror(exc.errno), path)
