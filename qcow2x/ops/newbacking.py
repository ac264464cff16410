"""Another backing file in the header of an image, in a way that a cut of power cannot tear.

One sector is written whole or not at all, more are not. The first one of the header decides what all
the others mean, so all that the new one needs is put where the old one does not look, and then one
write of one sector switches. Where the extensions reach into a second sector and have to move, an
intermediate header comes first, which has no names of features and the old name further down.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from qcow2x.errors import Qcow2Error

if TYPE_CHECKING:
    from qcow2x.image import Image

SECTOR = 512
MAX_NAME_BYTES = 1023

_NAME_AT = 8
_HEADER_LENGTH_AT = 100
_V2_LENGTH = 72
_FEATURE_NAMES = 0x6803F857


class HeaderFull(Qcow2Error, ValueError):
    """The name does not fit into the header cluster."""


def change_backing_file(image: Image, name: str | None, format: str | None) -> None:
    """Makes *name*, in *format*, the backing file that the header names; None: it names none.

    Durable at return; a cut of power leaves the old or the new one. The disk below the open *image*
    stays what it was. Nothing else may write to it meanwhile. Raises HeaderFull, ValueError for a
    name that is too long and for an image whose raw external data file is to hold everything.
    """
    if name is not None and len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        raise ValueError(f"{image.name}: the name of a backing file has at most 1023 bytes")
    if name is not None and image._header.data_file_raw:
        raise ValueError(f"{image.name}: a raw external data file cannot have a backing file")
    with image._exclusive:
        header = image._header
        before = header.backing_file, header.backing_format
        header.backing_file, header.backing_format = name, format
        try:
            new = header.encode()
        except ValueError as exc:
            header.backing_file, header.backing_format = before
            header.encode()
            raise HeaderFull(f"{image.name}: no room in the header: {exc}") from None
        _switch(image, image._file.pread(header.cluster_size, 0), new)


def _switch(image: Image, old: bytes, new: bytes) -> None:
    old_end, new_end = _used(old), _used(new)
    if any(old[at] != new[at] for at in range(SECTOR, min(old_end, new_end))):
        # The old header needs what the new one is going to overwrite.
        far = max(old_end, new_end)
        passing = _passing_header(old, far)
        if passing is None:
            # Not enough room for both: as QEMU does it, all at once.
            image._patch_header(0, new)
            return
        name = _name(old)
        if name:
            image._patch_header(far, name)
        image._patch_header(0, passing)
        old_end = far + len(name)
    if new_end > SECTOR:
        image._patch_header(SECTOR, new[SECTOR:new_end])
    image._patch_header(0, new[:SECTOR])
    if old_end > max(new_end, SECTOR):
        # No header looks there any more.
        start = max(new_end, SECTOR)
        image._patch_header(start, bytes(old_end - start))


def _name_place(head: bytes) -> tuple[int, int]:
    offset, length = struct.unpack_from(">QI", head, _NAME_AT)
    return offset, length if offset else 0


def _name(head: bytes) -> bytes:
    offset, length = _name_place(head)
    return head[offset : offset + length]


def _extensions_at(head: bytes) -> int:
    (version,) = struct.unpack_from(">I", head, 4)
    return _V2_LENGTH if version < 3 else struct.unpack_from(">I", head, _HEADER_LENGTH_AT)[0]


def _extensions(head: bytes) -> tuple[list[tuple[int, bytes]], int]:
    """Kind and bytes as they stand, and where the mark of the end ends."""
    at = _extensions_at(head)
    found = []
    while at + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0:
            break
        end = at + 8 + -(-length // 8) * 8
        found.append((kind, head[at:end]))
        at = end
    return found, at + 8


def _used(head: bytes) -> int:
    """Where that ends what a header says by itself."""
    offset, length = _name_place(head)
    return max(_extensions(head)[1], offset + length)


def _passing_header(old: bytes, name_at: int) -> bytes | None:
    """The first sector of a header that means what *old* does, with its extensions in that sector
    and the name at *name_at*. None where that cannot be."""
    kept = b"".join(data for kind, data in _extensions(old)[0] if kind != _FEATURE_NAMES)
    start = _extensions_at(old)
    if start + len(kept) + 8 > SECTOR or name_at + len(_name(old)) > len(old):
        return None
    sector = bytearray(old[:start] + kept).ljust(SECTOR, b"\0")
    if _name(old):
        struct.pack_into(">Q", sector, _NAME_AT, name_at)
    return bytes(sector)
