from collections.abc import Sequence

from qcow2x._core.storage import Storage

MAX_TABLE_CLUSTER_BYTES: int
MAX_NAME_BYTES: int
MIN_GRANULARITY_BITS: int
MAX_GRANULARITY_BITS: int
FLAG_IN_USE: int
FLAG_AUTO: int
FLAG_EXTRA_DATA_COMPATIBLE: int

_Entry = tuple[bytes, int, int, int, int, bytes]

def decode_directory(
    raw: bytes, count: int, cluster_size: int, name: str, at: int
) -> list[_Entry]: ...
def encode_directory(bitmaps: Sequence[_Entry]) -> bytes: ...

class Marks:
    size: int
    def __init__(self, size: int, granularity_bits: int) -> None: ...
    def mark(self, offset: int, length: int) -> None: ...
    @property
    def granularity_bits(self) -> int: ...
    def __bool__(self) -> bool: ...

class BitmapData:
    size: int
    def __init__(
        self, file: Storage, size: int, granularity_bits: int, cluster_bits: int
    ) -> None: ...
    @staticmethod
    def empty(
        file: Storage, size: int, granularity_bits: int, cluster_bits: int
    ) -> BitmapData: ...
    @staticmethod
    def load(
        file: Storage,
        size: int,
        granularity_bits: int,
        cluster_bits: int,
        table_offset: int,
        entries: int,
    ) -> BitmapData: ...
    def encode_table(self) -> bytes: ...
    @property
    def entries(self) -> int: ...
    def clusters(self) -> list[tuple[int, int]]: ...
    def runs(
        self, offset: int, marks: Marks | None, limit: int
    ) -> tuple[list[tuple[int, int, bool]], int]: ...
    def dirty_bytes(self, marks: Marks | None) -> int: ...
    def bits_at(self, first_byte: int, nbytes: int, marks: Marks | None) -> bytes: ...
    def grown(self, size: int, marks: Marks | None) -> tuple[BitmapData, int]: ...
    def write_changed(
        self, old: BitmapData, marks: Marks | None, host_off: int
    ) -> tuple[int, list[tuple[int, int]]]: ...
