"""Taking everything out of one layer, so that all of its disk shows what is below.

Where nothing but the disk's own mapping uses clusters, this does not go from cluster to cluster. The
L1 table becomes zeros, then a new refcount table, refcount block and L1 table are written to the
front of the file, and one sector of the header switches to them. Nothing is written over what the
header still points to, so that a cut of power leaves an image that is whole at any point: full,
empty, or empty with the clusters of the old content leaked. The dirty bit says so meanwhile, and the
next one to open the image for writing gets them back.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from qcow2x._core.image import (
    SITE_EMPTY_IMAGE,
    SITE_L1_UPDATE,
    SITE_REFBLOCK_ALLOC,
    SITE_REFTABLE_UPDATE,
)
from qcow2x.bitmap import frozen

if TYPE_CHECKING:
    from qcow2x._core.header import Header
    from qcow2x.image import Image

_L1_AND_REFCOUNT_TABLE_AT = 40
_INCOMPATIBLE_AT = 72
_DIRTY = 1
_OFFSET_MASK = 0x00FFFFFFFFFFFE00


def make_empty(image: Image) -> None:
    """Unmaps all of the disk of an image open for writing, durably.

    What its layer held is lost. Internal snapshots, bitmaps and the size stay as they are. Raises
    what writing raises; until the end a part may be unmapped already.
    """
    with image._exclusive:
        if not _only_the_disk_uses_clusters(image._header):
            _unmap_all(image)
            return
        with frozen(image):
            image._settle_refcounts()
            header = image._reread_header()
            try:
                _start_anew(image, header)
            finally:
                image._reload(image._reread_header())


def _unmap_all(image: Image) -> None:
    image._unmap(0, image.size)
    image.flush()
    image.flush()
    if image._header.has_data_file:
        # An external data file has no clusters that would be freed one by one.
        image._data.punch(0, image._data.size())


def _only_the_disk_uses_clusters(header: Header) -> bool:
    """And those that an empty image takes are counted by one refcount block."""
    return (
        not header.nb_snapshots
        and header.bitmap_directory is None
        and header.encryption is None
        and not header.has_data_file
        and header.l1_size > 0
        and _Places.needed(header) <= header.cluster_size * 8 // header.refcount_bits
    )


class _Places(NamedTuple):
    """Where the tables of an empty image lie, in clusters."""

    refcount_table: int
    refcount_block: int
    l1: int
    l1_clusters: int

    @staticmethod
    def needed(header: Header) -> int:
        """Clusters of an empty image: those and the header's."""
        return 3 + -(-header.l1_size * 8 // header.cluster_size)

    @property
    def end(self) -> int:
        return 1 + max(self.refcount_table, self.refcount_block, self.l1 + self.l1_clusters - 1)

    @property
    def used(self) -> list[int]:
        l1 = range(self.l1, self.l1 + self.l1_clusters)
        return [0, self.refcount_table, self.refcount_block, *l1]


def _start_anew(image: Image, header: Header) -> None:
    cluster = header.cluster_size
    if header.version >= 3:
        _set_dirty(image, header, True)
    l1_bytes = (_Places.needed(header) - 3) * cluster
    image._write_meta(bytes(l1_bytes), header.l1_offset, SITE_L1_UPDATE)
    image._barrier()
    # From here on only the header and the tables that it names are in use. What is at the front of
    # the file is mostly those, so it takes a second round to get there.
    for _ in range(2):
        places = _lowest_places(image, header)
        _write_tables(image, header, places)
        where = struct.pack(">QQI", places.l1 * cluster, places.refcount_table * cluster, 1)
        image._patch_header(_L1_AND_REFCOUNT_TABLE_AT, where)
        header = image._reread_header()
        if places.end == _Places.needed(header):
            break
    if image._file.size() > places.end * cluster:
        image._file.truncate(places.end * cluster)
        image._barrier()
    if header.version >= 3:
        _set_dirty(image, header, False)


def _set_dirty(image: Image, header: Header, dirty: bool) -> None:
    others = header.incompatible_features & ~_DIRTY
    image._patch_header(_INCOMPATIBLE_AT, struct.pack(">Q", others | (_DIRTY if dirty else 0)))


def _lowest_places(image: Image, header: Header) -> _Places:
    """The first clusters that the header and the tables which it names now do not need. The L1 table
    is all zeros: the new one may lie on it."""
    cluster = header.cluster_size
    first = header.refcount_table_offset // cluster
    kept = {0, *range(first, first + header.refcount_table_clusters)}
    table = image._file.pread(
        header.refcount_table_clusters * cluster, header.refcount_table_offset
    )
    for (entry,) in struct.iter_unpack(">Q", table):
        kept.add((entry & _OFFSET_MASK) // cluster)
    l1_clusters = _Places.needed(header) - 3
    old_l1 = range(header.l1_offset // cluster, header.l1_offset // cluster + l1_clusters)
    free = (n for n in range(len(kept) + l1_clusters + 2) if n not in kept and n not in old_l1)
    refcount_table, refcount_block = next(free), next(free)
    kept |= {refcount_table, refcount_block}
    l1 = 1
    while blocked := kept.intersection(range(l1, l1 + l1_clusters)):
        l1 = max(blocked) + 1
    return _Places(refcount_table, refcount_block, l1, l1_clusters)


def _write_tables(image: Image, header: Header, places: _Places) -> None:
    cluster = header.cluster_size
    table = struct.pack(">Q", places.refcount_block * cluster).ljust(cluster, b"\0")
    block = _refcounts_of_one(places.used, header.refcount_bits, cluster)
    image._write_meta(bytes(places.l1_clusters * cluster), places.l1 * cluster, SITE_EMPTY_IMAGE)
    image._write_meta(block, places.refcount_block * cluster, SITE_REFBLOCK_ALLOC)
    image._write_meta(table, places.refcount_table * cluster, SITE_REFTABLE_UPDATE)
    image._barrier()


def _refcounts_of_one(clusters: list[int], bits: int, nbytes: int) -> bytes:
    """The first refcount block, in which just these clusters have a refcount, and that is 1."""
    block = bytearray(nbytes)
    for n in clusters:
        if bits < 8:
            block[n * bits // 8] |= 1 << (n * bits % 8)
        else:
            block[(n + 1) * bits // 8 - 1] = 1
    return bytes(block)
