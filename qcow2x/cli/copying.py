"""What went wrong while disks were copied or compared, in QEMU's words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from qcow2x.cli.report import CommandError


def why(exc: BaseException) -> str:
    """Why a request to a disk failed, as the C library says it."""
    from qcow2x.cli.words import number

    return os.strerror(number(exc) or errno.EIO)


@contextmanager
def told_as(
    creating: str,
    *,
    reading: str = "error while reading at byte {offset}: ",
    writing: str = "error while writing at byte {offset}: ",
) -> Iterator[None]:
    """Errors of :func:`qcow2x.convert` leave the body as CommandError. The texts go in front."""
    from qcow2x.cli.main import is_expected
    from qcow2x.cli.words import hint, reason

    prefixes = {
        "reading": reading,
        "writing": writing,
        "reading block status": "error while reading block status at offset {offset}: ",
    }
    try:
        yield
    except Exception as exc:
        doing = getattr(exc, "doing", None)
        if doing is None or not is_expected(exc):
            raise
        if doing != "creating":
            offset = getattr(exc, "guest_offset", None)
            raise CommandError(prefixes[doing].format(offset=offset) + why(exc)) from exc
        text = reason(exc)
        if isinstance(exc, OSError) and exc.filename is not None:
            name = os.fsdecode(exc.filename)
            text = f"Could not create '{name}': {os.strerror(exc.errno or errno.EIO)}"
        raise CommandError(creating + text, hint=hint(exc).lstrip("\n")) from exc
