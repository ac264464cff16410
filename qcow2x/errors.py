"""What can go wrong, as exceptions.

Every exception of qcow2x is a :class:`Qcow2Error` and, where Python has a fitting builtin, that
builtin as well, so ``except OSError`` and ``except ValueError`` do what a reader expects. Each
carries ``path`` (the file), ``offset`` (bytes, or ``None``) and ``site`` (which access failed), and
``what``: the fact alone, in QEMU's words where QEMU knows it, or ``None``. ``hint`` is what can be done
about it, where there is something to say.
"""

from __future__ import annotations

import errno as _errno
import os as _os

__all__ = [
    "Cancelled",
    "CorruptImage",
    "FormatError",
    "ImageBroken",
    "ImageLocked",
    "KeyRequired",
    "NoSpace",
    "Qcow2Error",
    "ReferenceDenied",
    "StorageError",
    "UnsupportedFeature",
]


class Qcow2Error(Exception):
    """Base of all errors of qcow2x."""

    path: str | None = None
    offset: int | None = None
    site: str | None = None
    what: str | None = None
    hint: str = ""

    def _where(self, path: str | None, offset: int | None, site: str | None) -> Qcow2Error:
        self.path, self.offset, self.site = path, offset, site
        return self


class FormatError(Qcow2Error, ValueError):
    """The file is not qcow2, or its header breaks the specification."""


class UnsupportedFeature(FormatError):
    """The image needs a feature that cannot be used here; ``features`` names each.

    Where they are incompatible features of its header, ``unknown_bits`` has each bit's number, with
    the name that the image gives for it or None.
    """

    unknown_bits: tuple[tuple[int, str | None], ...] | None = None

    def __init__(self, *args: object, features: tuple[str, ...] = ()) -> None:
        super().__init__(*args)
        self.features = features


class CorruptImage(Qcow2Error, ValueError):
    """Metadata that contradicts itself; the data behind it cannot be trusted. ``marked``: the image's
    corrupt bit was set for it, and nothing is written any more."""

    marked = False


class ReferenceDenied(Qcow2Error, PermissionError):
    """The image names another file and the ``references`` policy does not allow opening it."""


class ImageLocked(Qcow2Error, BlockingIOError):
    """Another process or object holds the image in a way that excludes this use: it does not share
    ``permission``, or, where ``shared`` is set, uses it while this one would not share it."""

    permission: str = ""
    shared: bool = False


class StorageError(Qcow2Error, OSError):
    """The storage under the image failed; ``errno`` says how."""


class NoSpace(StorageError):
    """No room left in the storage. Nothing was lost: retry once there is room."""


class ImageBroken(Qcow2Error, OSError):
    """What an earlier failure left on the disk is not known: a sync failed, or a write of metadata that
    cannot be tried again. So this object takes no more writes. Reads go on."""


class KeyRequired(Qcow2Error, PermissionError):
    """The image is encrypted and no key was given, or the key does not fit."""


class Cancelled(Qcow2Error):
    """A long operation was cancelled; it left no half-written target."""


# The numbers are those of include/qcow2x/status.h.
_BY_STATUS: dict[int, tuple[type[Exception], str]] = {
    4: (CorruptImage, "image is corrupt"),
    5: (FormatError, "not a valid qcow2 image"),
    6: (UnsupportedFeature, "feature is not supported"),
    7: (ValueError, "offset or length is out of range"),
    8: (PermissionError, "image is open read-only"),
    9: (ImageBroken, "an earlier metadata write failed; the image takes no more writes"),
    10: (ValueError, "image is closed"),
    11: (CorruptImage, "compressed cluster does not decode"),
    12: (FormatError, "table exceeds the size limit"),
    14: (RuntimeError, "order of writes would contain a cycle"),
}


def exception_for(
    status: int, path: object, what: str | None, sys_errno: int, offset: int, site: str
) -> Exception:
    """The exception object of a core status; called by the core's one raiser."""
    name = _os.fsdecode(path) if isinstance(path, (str, bytes)) else str(path)
    located = site != "none"
    where = f" (offset {offset:#x}, {site})" if located else ""
    exc: Exception
    if status in (1, 2):
        number = sys_errno or (_errno.ENOSPC if status == 2 else _errno.EIO)
        kind = NoSpace if status == 2 else StorageError
        exc = kind(number, f"{name}: {what or 'storage failed'}: {_os.strerror(number)}{where}")
    elif status == 8:
        exc = PermissionError(_errno.EACCES, f"{name}: {what or _BY_STATUS[8][1]}")
    elif status == 9:
        exc = ImageBroken(_errno.EIO, f"{name}: {_BY_STATUS[9][1]}")
    else:
        cls, default = _BY_STATUS.get(status, (Qcow2Error, f"internal status {status}"))
        exc = cls(f"{name}: {what or default}{where}")
    if isinstance(exc, Qcow2Error):
        exc.what = what
        exc._where(name, offset if located else None, site if located else None)
    return exc
