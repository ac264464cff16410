"""Tables without zero flags, as version 2 of the format has none.

The live disk's flags go by ordinary writes. In the tables of internal snapshots an entry with the
flag becomes one that maps nothing, where no backing file would show through, else one that maps a
cluster of zeros, which all of them share. What each reads as does not change with any single write.
No refcount is ever too low: the new cluster's begins at the highest there is, those of clusters that
lost a reference stay, and all are counted anew at the end. Until then the dirty bit asks whoever
opens the image for writing to do so.
"""

from __future__ import annotations

import array
import struct
import sys
from collections import Counter
from typing import TYPE_CHECKING

from qcow2x._core.image import SITE_L2_UPDATE, SITE_REFBLOCK_UPDATE
from qcow2x.bitmap import frozen
from qcow2x.snapshot import guard_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qcow2x.image import Image

# Kinds of runs, as in include/qcow2x/plan.h.
_ZERO = 2
_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_ZERO_FLAG, _COMPRESSED_FLAG = 1, 1 << 62
_INCOMPATIBLE_AT = 72
_DIRTY = 1
#: What 16 bits count.
_MOST = 0xFFFF
#: What is read of a disk's tables at once.
_L1_BYTES = 1 << 20


def drop_zero_flags(image: Image, progress: Callable[[int, int], None]) -> None:
    """Takes the zero flag out of every L2 entry of an image open for writing, with refcounts of 16
    bits, durably; the disk and its snapshots read as before. Nothing else may write meanwhile.

    Clusters of an encrypted image cannot be shared, so its snapshots must have no such entries where
    there is a backing file. ``progress(done, total)`` counts L1 entries.
    """
    live = image._header.l1_size
    total = live + sum(snapshot.l1_size for snapshot in image.snapshots)
    covered = image.cluster_size // 8 * image.cluster_size
    for index in range(live):
        end = min(image.size, (index + 1) * covered)
        _in_live_disk(image, min(index * covered, end), end)
        progress(index + 1, total)
    image.flush()
    # What the first flush set free lowers refcounts in memory; the second one writes them.
    image.flush()
    if image._header.nb_snapshots:
        with frozen(image):
            _in_tables(image, lambda entries: progress(live + entries, total))


def _in_live_disk(image: Image, at: int, end: int) -> None:
    """Unmapped where nothing shows through, else written."""
    while at < end:
        for start, nbytes, kind, _ in image._plan(at, end - at):
            at = start + nbytes
            if kind != _ZERO:
                continue
            if image._backing is None:
                image._unmap(start, nbytes)
            else:
                blank = bytes(min(nbytes, 1 << 20))
                for place in range(start, at, len(blank)):
                    image.pwrite(blank[: at - place], place)
            # The plan told of tables that have changed now.
            break


def _in_tables(image: Image, progress: Callable[[int], None]) -> None:
    header = image._reread_header()
    places = [(header.l1_offset, header.l1_size)]
    places += [(snapshot.l1_offset, snapshot.l1_size) for snapshot in image.snapshots]
    references = Counter(offset for place in places for offset in _l2_tables(image, place))
    flagged: dict[int, int] = {}
    for offset in references:
        if flags := sum(map(_has_flag, _read(image, offset))):
            flagged[offset] = flags
    if not flagged:
        return
    uses = sum(flags * references[offset] for offset, flags in flagged.items())
    zeros = _Zeros(image, uses, max(references[offset] for offset in flagged))
    image._patch_header(_INCOMPATIBLE_AT, struct.pack(">Q", header.incompatible_features | _DIRTY))
    try:
        entries = 0
        # The live disk has none any more, but for what lies behind its end.
        for place in [*places[1:], places[0]]:
            for offset in _l2_tables(image, place):
                if flagged.pop(offset, 0):
                    table = _read(image, offset)
                    for index, entry in enumerate(table):
                        if _has_flag(entry):
                            table[index] = zeros.take(references[offset])
                    image._write_meta(_swapped(table).tobytes(), offset, SITE_L2_UPDATE)
                entries += 1
                if place is not places[0]:
                    progress(entries)
        image._barrier()
        from qcow2x.ops.check import rebuild_refcounts

        rebuild_refcounts(image._file, image._reread_header())
    finally:
        image._reload(image._reread_header())
        guard_tables(image, image._guard_all)


class _Zeros:
    """What entries map instead: nothing, or a cluster of zeros that as many share as its refcount
    can count."""

    def __init__(self, image: Image, uses: int, most_at_once: int) -> None:
        self._cluster_size = image.cluster_size
        self._at = self._left = 0
        if image._backing is None:
            return
        clusters = -(-uses // (_MOST - most_at_once + 1))
        nbytes = clusters * self._cluster_size
        self._at = image._reserve(nbytes)
        self._left = _MOST
        for n in range(clusters):
            image._write_meta(
                bytes(self._cluster_size), self._at + n * self._cluster_size, SITE_L2_UPDATE
            )
            at = _place_of_refcount(image, self._at // self._cluster_size + n)
            image._write_meta(struct.pack(">H", _MOST), at, SITE_REFBLOCK_UPDATE)
        # Edge: zeros and refcounts before the first entry that maps them.
        image._barrier()

    def take(self, references: int) -> int:
        """The entry for a table that is referred to so many times."""
        if not self._at:
            return 0
        if references > self._left:
            self._at += self._cluster_size
            self._left = _MOST
        self._left -= references
        return self._at


def _place_of_refcount(image: Image, cluster: int) -> int:
    """Where the refcount of a cluster stands in the file."""
    header = image._reread_header()
    entry: int
    block, within = divmod(cluster, header.cluster_size // 2)
    (entry,) = struct.unpack(">Q", image._file.pread(8, header.refcount_table_offset + block * 8))
    return (entry & _OFFSET_MASK) + within * 2


def _l2_tables(image: Image, l1: tuple[int, int]) -> Iterator[int]:
    """Where the L2 tables lie that an L1 table of so many entries names; 0 for none."""
    place, entries = l1
    for at in range(0, entries * 8, _L1_BYTES):
        raw = image._file.pread(min(_L1_BYTES, entries * 8 - at), place + at)
        for (entry,) in struct.iter_unpack(">Q", raw):
            yield entry & _OFFSET_MASK


def _read(image: Image, offset: int) -> array.array[int]:
    """The entries of the L2 table there; none where there is no table."""
    raw = image._file.pread(image.cluster_size, offset) if offset else b""
    return _swapped(array.array("Q", raw.ljust(len(raw) and image.cluster_size, b"\0")))


def _has_flag(entry: int) -> bool:
    return bool(entry & _ZERO_FLAG) and not entry & _COMPRESSED_FLAG


def _swapped(table: array.array[int]) -> array.array[int]:
    """Between the order of bytes in the file and this machine's."""
    table = array.array("Q", table)
    if sys.byteorder == "little":
        table.byteswap()
    return table
