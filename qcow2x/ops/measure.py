"""How large a file a new image needs: ``qemu-img measure`` as a function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcow2x.ops.disk import SECTOR, extents_of, image_of, open_disk
from qcow2x.types import Extent

if TYPE_CHECKING:
    from qcow2x.encryption import Encryption

ENTRY = 8
#: An L1 table of more bytes than this no reader takes.
MAX_L1_BYTES = 32 << 20
#: An entry of the bitmap directory without its name, and what it is padded to.
DIRECTORY_ENTRY = 24
DIRECTORY_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Measurement:
    """Bytes that a new image takes on the host; never less than what it turns out to take."""

    #: For what the source holds now.
    required: int
    #: Once the guest has written everywhere.
    fully_allocated: int
    #: For copies of the source's persistent bitmaps; None where source or target can have none.
    bitmaps: int | None = None


def measure(
    src: Any = None,
    *,
    size: int | None = None,
    src_format: str | None = None,
    dst_format: str = "qcow2",
    cluster_size: int = 65536,
    compat: str = "1.1",
    refcount_bits: int = 16,
    extended_l2: bool = False,
    preallocation: str = "off",
    backing_file: str | None = None,
    encryption: Encryption | None = None,
    snapshot: str | None = None,
    key: Any = None,
    references: Any = "deny",
    lock: bool = True,
) -> Measurement:
    """How many bytes a new image needs for the disk *src*, or for an empty one of *size* bytes.

    *src* is a path, an open image or a storage object, opened as :func:`qcow2x.convert` does with
    *src_format*, *snapshot*, *key*, *references* and *lock*; only its metadata is read.
    *dst_format* is ``"qcow2"``, ``"raw"`` or ``"luks"``; the other options describe the new image
    as for :func:`qcow2x.create`. With a *backing_file* nothing is known of what it already holds,
    so all of the disk counts. Any number of threads may measure at once.

    Raises ValueError for options that do not go together or a disk that is too large for the
    cluster size, and what opening *src* raises.
    """
    if (src is None) == (size is None):
        raise ValueError("measure takes either a source or size=")
    if dst_format not in ("qcow2", "raw", "luks"):
        raise ValueError(f"Unknown file format '{dst_format}'")
    if dst_format == "luks" and encryption is None:
        raise ValueError("a luks target needs encryption=")
    with ExitStack() as stack:
        disk = None
        if src is not None:
            disk, owned = open_disk(
                src, src_format, references=references, snapshot=snapshot, key=key, lock=lock
            )
            if owned:
                stack.callback(disk.close)
        wanted = disk.size if disk is not None else size
        assert wanted is not None
        if dst_format != "qcow2":
            if disk is None and dst_format == "raw":
                wanted = -(-wanted // SECTOR) * SECTOR
            total = wanted + (0 if encryption is None else encryption.header_bytes())
            return Measurement(total, total)
        layout = _layout(cluster_size, compat, refcount_bits, extended_l2)
        return _measure_qcow2(disk, wanted, layout, compat, preallocation, backing_file, encryption)


@dataclass(frozen=True, slots=True)
class _Layout:
    cluster_size: int
    refcount_bits: int
    l2_entry: int

    def whole(self, nbytes: int) -> int:
        return -(-nbytes // self.cluster_size) * self.cluster_size

    def full_bytes(self, size: int) -> int:
        """An image whose every cluster is allocated: header, L1, L2, refcounts and data."""
        cluster = self.cluster_size
        data = self.whole(size)
        l2 = self.whole(data // cluster * self.l2_entry)
        l1 = self.whole(l2 // cluster * ENTRY)
        return self.refcount_bytes(cluster + l2 + l1 + data) + cluster + l2 + l1 + data

    def refcount_bytes(self, counted: int) -> int:
        """Refcount blocks and their table, which count themselves too, for *counted* other bytes."""
        cluster = self.cluster_size
        per_block = cluster * 8 // self.refcount_bits
        blocks = table = 0
        while True:
            before = blocks + table
            blocks = -(-(counted // cluster + before) // per_block)
            table = -(-blocks // (cluster // ENTRY))
            if blocks + table == before:
                return before * cluster


def _layout(cluster_size: int, compat: str, refcount_bits: int, extended_l2: bool) -> _Layout:
    from qcow2x.ops.create import check_layout

    check_layout(cluster_size, compat, refcount_bits, extended_l2)
    return _Layout(cluster_size, refcount_bits, 16 if extended_l2 else ENTRY)


def _measure_qcow2(
    disk: Any,
    size: int,
    layout: _Layout,
    compat: str,
    preallocation: str,
    backing_file: str | None,
    encryption: Encryption | None,
) -> Measurement:
    from qcow2x.image import PREALLOCATIONS

    if preallocation not in PREALLOCATIONS:
        raise ValueError(f"Parameter 'preallocation' does not accept value '{preallocation}'")
    cluster = layout.cluster_size
    data = layout.whole(size)
    entries = -(-(data // cluster * layout.l2_entry) // cluster)
    if entries * ENTRY > MAX_L1_BYTES:
        raise ValueError("The image size is too large (try using a larger cluster size)")
    stored = 0
    if preallocation in ("falloc", "full") or (disk is not None and backing_file is not None):
        stored = data
    elif disk is not None:
        stored = _data_clusters(extents_of(disk), cluster) * cluster
    full = layout.full_bytes(size)
    if encryption is not None and encryption.format == "luks":
        full += layout.whole(encryption.header_bytes())
    bitmaps = None
    if disk is not None and compat not in ("0.10", "v2"):
        bitmaps = _bitmap_bytes(disk, layout)
    return Measurement(full - data + stored, full, bitmaps)


def _data_clusters(extents: Iterator[Extent], cluster: int) -> int:
    """How many clusters hold some data."""
    count = following = 0
    for extent in extents:
        if extent.data and not extent.zero:
            first = max(extent.offset // cluster, following)
            following = max(following, -(-(extent.offset + extent.length) // cluster))
            count += following - first
    return count


def _bitmap_bytes(disk: Any, layout: _Layout) -> int | None:
    """Clusters of bits, tables and the directory for copies of all bitmaps of the source."""
    image = image_of(disk)
    if image is None or image.info().compat == "0.10":
        return None
    total = directory = 0
    for name, granularity, _ in image.bitmaps.layout():
        bits = -(-image.size // granularity)
        data = layout.whole(-(-bits // 8))
        total += data + layout.whole(data // layout.cluster_size * ENTRY)
        entry = DIRECTORY_ENTRY + len(name.encode("utf-8", "surrogateescape"))
        directory += -(-entry // DIRECTORY_ALIGNMENT) * DIRECTORY_ALIGNMENT
    return total + layout.whole(directory)
