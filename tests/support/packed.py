"""Where compressed clusters lie."""

import struct
from pathlib import Path


def stream_of(path: Path, cluster: int) -> tuple[int, int]:
    """Host offset and bytes of a compressed cluster's stream, of an image with one L2 table."""
    raw = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", raw, 40)
    (l2,) = struct.unpack_from(">Q", raw, l1)
    (entry,) = struct.unpack_from(">Q", raw, (l2 & 0x00FFFFFFFFFFFE00) + 8 * cluster)
    assert entry >> 62 & 1
    shift = 62 - (16 - 8)
    offset = entry & (1 << shift) - 1
    return offset, ((entry >> shift & 0xFF) + 1) * 512 - offset % 512
