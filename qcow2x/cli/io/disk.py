"""The open file: one node under the rules that QEMU's block layer has for its users.

Every method raises Failed with the system's words for what went wrong.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qcow2x.cli import words
from qcow2x.cli.io.language import Failed
from qcow2x.cli.report import CommandError

#: The order in which a node's own child is looked for.
_PRIMARY = "file"


class RequestFailed(Exception):
    """A request that could not be served, with the errno that says why."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


def error_number(exc: BaseException) -> int:
    """The errno with which QEMU would have answered."""
    from qcow2x.errors import CorruptImage, UnsupportedFeature

    if isinstance(exc, RequestFailed):
        return exc.number
    if isinstance(exc, UnsupportedFeature):
        return errno.ENOTSUP
    if isinstance(exc, CorruptImage):
        return errno.EIO
    if isinstance(exc, MemoryError):
        return errno.ENOMEM
    number = words.number(exc)
    return number if number is not None else errno.EINVAL


@contextmanager
def failing_as(text: str) -> Iterator[None]:
    """What goes wrong inside is told as ``text: reason``."""
    try:
        yield
    except (Failed, CommandError):
        raise
    except Exception as exc:
        if not is_expected(exc):
            raise
        _tell_corruption(exc)
        raise Failed(f"{text}: {os.strerror(error_number(exc))}") from exc


def _tell_corruption(exc: Exception) -> None:
    """What was found damaged is told besides what failed for it."""
    from qcow2x.errors import CorruptImage

    if isinstance(exc, CorruptImage) and exc.site != "compressed_read":
        what = exc.what or str(exc)
        if exc.marked:
            text = f"Marking image as corrupt: {what}; further"
        else:
            text = f"Image is corrupt: {what}; further non-fatal"
        print(f"qcow2: {text} corruption events will be suppressed", file=sys.stderr)


def is_expected(exc: Exception) -> bool:
    """Whether an exception tells of a mistake or of the outside world, and not of a bug."""
    from qcow2x.errors import Qcow2Error

    return isinstance(exc, (RequestFailed, Qcow2Error, OSError, ValueError, MemoryError))


class Disk:
    """A node (or an image that serves as one) in a cache mode. ``durable``: a write is on the disk
    when its command ends (writethrough and directsync)."""

    def __init__(self, node: Any, *, durable: bool) -> None:
        self.node = node
        self.durable = durable

    # ---- Requests ----

    def check_range(self, offset: int, length: int) -> None:
        size = self.node.size
        if offset > size or length > size - offset:
            raise RequestFailed(errno.EIO)

    def require_writable(self) -> None:
        if not self.node.writable:
            raise CommandError("Block node is read-only")

    def read(self, buffer: memoryview, offset: int) -> None:
        self.check_range(offset, len(buffer))
        self.node.preadinto(buffer, offset)

    def write(self, data: memoryview, offset: int, *, fua: bool = False) -> None:
        self.check_range(offset, len(data))
        self.node.pwrite(data, offset, fua=fua or self.durable)

    def write_compressed(self, data: memoryview, offset: int) -> None:
        self.check_range(offset, len(data))
        self._write_compressed(data, offset)
        if self.durable:
            self.node.flush()

    def _write_compressed(self, data: memoryview, offset: int) -> None:
        write = getattr(self.node, "pwrite_compressed", None)
        if write is None:
            image = getattr(self.node, "image", None)
            if image is None:
                raise RequestFailed(errno.ENOTSUP)
            write = image.pwrite_compressed
        write(data, offset)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool, fua: bool = False, fast: bool = False
    ) -> None:
        """``fast``: ENOTSUP rather than writing zeros as data."""
        self.check_range(offset, length)
        if fast and not self._zeroes_are_fast(offset, length):
            raise RequestFailed(errno.ENOTSUP)
        self.node.write_zeroes(offset, length, unmap=unmap, fua=fua or self.durable)

    def _zeroes_are_fast(self, offset: int, length: int) -> bool:
        image = self.image
        if image is None:
            return True
        if image.info().compat == "0.10":
            return False
        unit = image.cluster_size
        if image.info().extended_l2:
            unit //= 32
        end = offset + length
        return not offset % unit and (not end % unit or end == image.size)

    def discard(self, offset: int, length: int) -> None:
        self.check_range(offset, length)
        self.node.discard(offset, length)

    def flush(self) -> None:
        self.node.flush()

    # ---- The state of a virtual machine, kept beside the disk ----

    def read_vmstate(self, buffer: memoryview, offset: int) -> None:
        self._vmstate_image().vmstate_preadinto(buffer, offset)

    def write_vmstate(self, data: memoryview, offset: int) -> None:
        self._vmstate_image().vmstate_pwrite(data, offset)
        if self.durable:
            self.node.flush()

    def _vmstate_image(self) -> Any:
        node: Any = self.node
        while node is not None:
            image = node if hasattr(node, "vmstate_pwrite") else getattr(node, "image", None)
            if image is not None:
                return image
            node = getattr(node, "children", {}).get(_PRIMARY)
        raise RequestFailed(errno.ENOTSUP)

    # ---- Looking ----

    @property
    def size(self) -> int:
        return int(self.node.size)

    @property
    def image(self) -> Any:
        """The qcow2 image on top, or None."""
        return self.node if hasattr(self.node, "vmstate_pwrite") else self.node.image

    def allocation(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """The runs of a range, cut at the end of the disk: how long, and whether the top layer
        itself says what is in there."""
        length = min(length, self.size - offset)
        if length <= 0:
            return
        run, before = 0, False
        for extent in self.node.extents(offset, length):
            allocated = extent.depth == 0 and extent.allocated
            if run and allocated != before:
                yield run, before
                run = 0
            run += extent.length
            before = allocated
        if run:
            yield run, before

    def debugger(self) -> Any:
        """The node that can stop requests (blkdebug): this one or the nearest below it."""
        node: Any = self.node
        while node is not None:
            if hasattr(node, "debug_breakpoint"):
                return node
            node = getattr(node, "children", {}).get(_PRIMARY)
        raise RequestFailed(errno.ENOTSUP)

    def close(self) -> None:
        self.node.close()
