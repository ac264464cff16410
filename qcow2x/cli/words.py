"""Exceptions in QEMU's words: what qemu-img and qemu-io would say of the same thing."""

from __future__ import annotations

import errno
import os

from qcow2x.drivers.errors import OpenError
from qcow2x.errors import (
    FormatError,
    ImageLocked,
    KeyRequired,
    NoSpace,
    Qcow2Error,
    StorageError,
    UnsupportedFeature,
)


def opening(exc: BaseException, filename: str) -> str:
    """What is said when a disk cannot be opened; ``filename`` as it was given on the command line,
    an option string with ``--image-opts``. More lines may follow the first: a hint."""
    return f"Could not open '{filename}': {reason(exc)}{hint(exc)}"


def reason(exc: BaseException) -> str:
    """Why something failed, without saying what did."""
    if isinstance(exc, OpenError) and exc.__cause__ is not None:
        return f"{exc.doing}: {reason(exc.__cause__)}"
    if isinstance(exc, ImageLocked) and exc.permission:
        return f'Failed to get {"shared " if exc.shared else ""}"{exc.permission}" lock'
    if isinstance(exc, KeyRequired):
        return "Invalid password, cannot unlock any keyslot"
    if isinstance(exc, UnsupportedFeature) and exc.unknown_bits is not None:
        return f"Unsupported qcow2 feature(s): {', '.join(_features(exc))}"
    if isinstance(exc, (NoSpace, StorageError)) and exc.errno:
        return os.strerror(exc.errno)
    if isinstance(exc, OSError) and exc.errno is not None:
        text = os.strerror(exc.errno)
        if exc.filename is not None:
            return f"Could not open '{os.fsdecode(exc.filename)}': {text}"
        return text
    if isinstance(exc, Qcow2Error) and exc.what is not None:
        return exc.what
    return str(exc) or type(exc).__name__


def _features(exc: UnsupportedFeature) -> list[str]:
    """The features that an image says the names of, then the bits of all others as one number."""
    unnamed = sum(1 << bit for bit, name in exc.unknown_bits or () if name is None)
    names = [name for _, name in exc.unknown_bits or () if name is not None]
    return names + ([f"Unknown incompatible feature: {unnamed:x}"] if unnamed else [])


def hint(exc: BaseException) -> str:
    """What QEMU adds on a line of its own, with the line break in front; mostly nothing."""
    if isinstance(exc, OpenError) and exc.__cause__ is not None:
        return hint(exc.__cause__)
    if isinstance(exc, ImageLocked) and exc.permission:
        return f"\nIs another process using the image [{exc.path}]?"
    text = getattr(exc, "hint", "")
    return f"\n{text.rstrip()}" if text else ""


def misplaced_l1(exc: BaseException) -> int | None:
    """The errno that QEMU has for a snapshot whose L1 table cannot be where its entry says; None if
    that is not what went wrong."""
    from qcow2x.snapshot import SITE_L1

    if getattr(exc, "site", None) != SITE_L1:
        return None
    return errno.EFBIG if isinstance(exc, FormatError) else errno.EINVAL


def number(exc: BaseException) -> int | None:
    """The errno of an error, where it has one."""
    while isinstance(exc, OpenError) and exc.__cause__ is not None:
        exc = exc.__cause__
    return exc.errno if isinstance(exc, OSError) else None
