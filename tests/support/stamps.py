"""Data that tells where it belongs: every sector carries its guest offset and a sequence number, so
a sector that turns up in the wrong place, or an old one that comes back, is seen at once."""

import random
import struct

SECTOR = 512
_FORM = struct.Struct(">QQ")


def stamped(offset: int, length: int, sequence: int) -> bytes:
    """Stamped bytes for guest range [offset, offset + length); compresses well."""
    first = offset // SECTOR
    last = -(-(offset + length) // SECTOR)
    repeats = SECTOR // _FORM.size
    data = b"".join(_FORM.pack(n * SECTOR, sequence) * repeats for n in range(first, last))
    return data[offset - first * SECTOR :][:length]


def noise(offset: int, length: int, sequence: int) -> bytes:
    """Bytes that do not compress, different for every range and number."""
    return random.Random(f"{offset} {length} {sequence}").randbytes(length)


def explain(offset: int, got: bytes, wanted: bytes | bytearray) -> str:
    """Where two ranges differ first, and what the sector found there says of itself."""
    if len(got) != len(wanted):
        return f"{len(got)} bytes instead of {len(wanted)} at {offset}"
    at = next(i for i in range(len(got)) if got[i] != wanted[i])
    start = max(0, (offset + at) // SECTOR * SECTOR - offset)
    return (
        f"byte {offset + at:#x} differs: its sector holds "
        f"{_describe(got[start : start + _FORM.size])} instead of "
        f"{_describe(bytes(wanted[start : start + _FORM.size]))}"
    )


def _describe(data: bytes) -> str:
    if not any(data):
        return "zeros"
    if len(data) < _FORM.size:
        return data.hex()
    return "offset {:#x} sequence {}".format(*_FORM.unpack(data))
