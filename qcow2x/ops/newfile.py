"""New disks that are not qcow2: raw ones, and LUKS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcow2x.errors import NoSpace
from qcow2x.ops.create import SECTOR, Hints, name_of, open_target
from qcow2x.ops.disk import RawDisk

if TYPE_CHECKING:
    from qcow2x.encryption import Encryption
    from qcow2x.storage import Source, Storage

__all__ = ["create_luks", "create_raw"]

_PAYLOAD_OFFSET_AT = 104

PREALLOCATIONS = ("off", "falloc", "full")


def create_raw(
    path: Source,
    size: int,
    *,
    preallocation: str = "off",
    nocow: bool = False,
    extent_size_hint: int = 0,
) -> None:
    """Makes a raw disk of ``size`` bytes, rounded up to 512, that reads as zeros; durable when the
    call returns. A device keeps its size and, but for its length, is not looked at.

    ``preallocation`` is ``off``, ``falloc`` (blocks reserved) or ``full`` (written). Raises
    ValueError, ImageLocked if another program has the existing file open, and OSError (NoSpace).
    """
    _check(size, preallocation)
    with open_target(path, Hints(nocow, extent_size_hint)) as storage:
        _fill(storage, b"", size, preallocation)


def create_luks(
    path: Source,
    size: int,
    encryption: Encryption,
    *,
    preallocation: str = "off",
    detached_header: bool = False,
    nocow: bool = False,
    extent_size_hint: int = 0,
) -> None:
    """Makes a LUKS encrypted disk of ``size`` bytes, rounded up to 512; durable when the call
    returns. With ``detached_header`` the file holds the header and the key slots only.

    What it reads as is not defined before it is written. Raises what :func:`create_raw` raises.
    """
    _check(size, preallocation)
    area = encryption.new_area(name_of(path))
    if detached_header:
        # The data begin at the start of the other file: "payload-offset" of the LUKS header is 0.
        area = area[:_PAYLOAD_OFFSET_AT] + bytes(4) + area[_PAYLOAD_OFFSET_AT + 4 :]
    with open_target(path, Hints(nocow, extent_size_hint)) as storage:
        _fill(storage, area, 0 if detached_header else size, preallocation)


def _check(size: int, preallocation: str) -> None:
    if size < 0:
        raise ValueError(f"size must not be negative, but is {size}")
    if preallocation not in PREALLOCATIONS:
        raise ValueError(f"Unsupported preallocation mode '{preallocation}'")


def _fill(storage: Storage, front: bytes, size: int, preallocation: str) -> None:
    total = len(front) + -(-size // SECTOR) * SECTOR
    if getattr(storage, "is_device", False):
        if storage.size() < total:
            raise NoSpace(28, f"{storage.name}: the device has only {storage.size()} bytes")
    else:
        storage.truncate(0)
        RawDisk(storage, "r+").resize(total, preallocation=preallocation)
    if front:
        storage.pwrite(front, 0)
    storage.flush()
