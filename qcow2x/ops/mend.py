"""Mending the structures of an image that are not L1 and L2 entries: the refcount table and its
blocks, the snapshot table, the bitmap directory, L2 tables that lie where something else lies.

All of it works on an overlay. New tables go behind the end of the image.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from qcow2x._core.check import Checker
from qcow2x._core.header import Header
from qcow2x._core.repair import STEP_CLEAN, STEP_ENTRIES, STEP_LINK, STEP_NEW
from qcow2x.errors import CorruptImage, NoSpace, UnsupportedFeature
from qcow2x.ops.overlay import Overlay
from qcow2x.storage import FileStorage, Storage

# Offsets in the header, section "Header"; include/qcow2x/format.h has them all.
_L1_OFFSET, _RT_OFFSET, _NB_SNAPSHOTS, _INCOMPAT, _AUTOCLEAR = 40, 48, 60, 72, 88
_DIRTY_AND_CORRUPT = 3
_AUTOCLEAR_BITMAPS, _AUTOCLEAR_KNOWN = 1, 3
_EXT_BITMAPS = 0x23852875
_MAX_RT_BYTES = 8 << 20
_MAX_L1_BYTES = 32 << 20
_MAX_SNAPSHOT_EXTRA = 1024
_MAX_SNAPSHOT_TABLE = 1024 * 65536
_MAX_SNAPSHOT_SPAN = 0x7FFFFFFF
_SNAPSHOT_EXTRA_V3 = 16
_NO_ICOUNT = (1 << 64) - 1
_MAX_BITMAP_BYTES = 512 << 20
_BITMAP_IN_USE = 1
_BITMAP_RESERVED, _BITMAP_OFFSET = 0xFF000000000001FE, 0x00FFFFFFFFFFFE00


class Space:
    """Clusters behind the end of the image, for new tables."""

    def __init__(self, overlay: Overlay, storage: Storage, cluster: int, end_of_use: int) -> None:
        self._overlay = overlay
        self._cluster = cluster
        # A device has a size of its own: there the image ends with the last cluster in use.
        self._fixed = isinstance(storage, FileStorage) and storage.is_device
        end = end_of_use if self._fixed else max(end_of_use, overlay.size())
        self.end = -(-end // cluster) * cluster

    def take(self, n_clusters: int) -> int:
        """The host offset of so many clusters in a row, which read as zeros."""
        start, self.end = self.end, self.end + n_clusters * self._cluster
        if self._fixed:
            if self.end > self._overlay.size():
                raise NoSpace(28, f"{self._overlay.name}: no room on the device for a repair")
            for at in range(start, self.end, self._cluster):
                self._overlay.write(STEP_NEW, bytes(self._cluster), at)
        else:
            self._overlay.grow(self.end)
        return start

    def put(self, data: bytes) -> int:
        """``data`` in clusters of its own; returns where."""
        at = self.take(max(1, -(-len(data) // self._cluster)))
        self._overlay.write(STEP_NEW, data, at)
        return at


class Mender:
    """The mending of one image; each method changes the overlay where it has to."""

    def __init__(self, overlay: Overlay, header: Header, space: Space) -> None:
        self._overlay = overlay
        self._header = header
        self._space = space

    def _read(self, nbytes: int, offset: int) -> bytes:
        return self._overlay.pread(nbytes, offset).ljust(nbytes, b"\0") if nbytes else b""

    # ---- header ----

    def clear_unknown_autoclear(self) -> None:
        """What every writer must do before anything else."""
        known = self._header.autoclear_features & _AUTOCLEAR_KNOWN
        if self._header.version >= 3 and known != self._header.autoclear_features:
            self._overlay.write(STEP_NEW, struct.pack(">Q", known), _AUTOCLEAR)

    def mark_sound(self) -> None:
        """Clears the dirty and the corrupt bit."""
        bits = self._header.incompatible_features
        if self._header.version >= 3 and bits & _DIRTY_AND_CORRUPT:
            sound = struct.pack(">Q", bits & ~_DIRTY_AND_CORRUPT)
            self._overlay.write(STEP_CLEAN, sound, _INCOMPAT)

    # ---- The disk's tables ----

    def part_disk_l1(self, looked: Checker) -> bool:
        """Copies the disk's L1 table to a place of its own where it lies where something else does,
        which may be what the guest reads. Returns whether it had to."""
        nbytes = self._header.l1_size * 8
        if not looked.disk_l1_shared or nbytes > _MAX_L1_BYTES:
            return False
        place = self._space.put(self._read(nbytes, self._header.l1_offset))
        self._overlay.write(STEP_LINK, struct.pack(">Q", place), _L1_OFFSET)
        return True

    def part_l2_tables(self, looked: Checker) -> dict[int, int]:
        """Copies each L2 table that lies where something else lies to a place of its own; returns
        where each went. The caller makes the L1 entries follow."""
        cluster = self._header.cluster_size
        return {
            offset: self._space.put(self._read(cluster, offset))
            for offset in sorted(looked.shared_l2)
            if offset % cluster == 0
        }

    # ---- refcounts ----

    def place_refcounts(self, looked: Checker, spoiled: set[int], rt_spoiled: bool) -> None:
        """Gives every cluster in use a refcount block to have its refcount in: blocks that are
        missing or ``spoiled`` are replaced by empty ones, and the refcount table as well where it
        is spoiled or too small. The refcounts themselves are still to be set."""
        cluster = self._header.cluster_size
        per_block = cluster * 8 // self._header.refcount_bits
        first = self._space.end // cluster
        old = looked.refcount_table()
        table = [0 if i in spoiled else entry for i, (entry, _) in enumerate(old)]
        needed = {i for i in spoiled if i in looked.used_blocks} | set(looked.missing_blocks)
        n_table = 1 if rt_spoiled else 0
        while True:
            # The new clusters need refcounts themselves: add until nothing is missing.
            taken = len(needed) + n_table
            if not taken:
                break
            covering = range(first // per_block, (first + taken - 1) // per_block + 1)
            more = {i for i in covering if i >= len(table) or not table[i]} | needed
            entries = max([len(table), *(i + 1 for i in more)])
            n_more = n_table
            if n_table or entries > len(table):
                n_more = -(-entries * 8 // cluster)
            if more == needed and n_more == n_table:
                break
            needed, n_table = more, n_more
        if n_table * cluster > _MAX_RT_BYTES:
            raise UnsupportedFeature(
                f"{self._overlay.name}: the image has grown too long for a refcount table",
                features=("repair of an image of this size",),
            )
        for index in sorted(needed):
            block = self._space.take(1)
            table.extend([0] * (index + 1 - len(table)))
            table[index] = block
        if n_table:
            raw = struct.pack(f">{len(table)}Q", *table).ljust(n_table * cluster, b"\0")
            place = struct.pack(">QI", self._space.put(raw), n_table)
            self._overlay.write(STEP_LINK, place, _RT_OFFSET)
            return
        for index, ((entry, _), new) in enumerate(zip(old, table, strict=True)):
            if entry != new:
                at = self._header.refcount_table_offset + index * 8
                self._overlay.write(STEP_LINK, struct.pack(">Q", new), at)

    # ---- snapshots ----

    def mend_snapshot_table(self, looked: Checker) -> bool:
        """Writes the table anew where entries lack what version 3 requires (the disk's size is
        that of the active disk, as it is for readers that meet such an entry) or have more extra
        data than any reader takes. What is past the limits of the table is dropped. A snapshot
        whose L1 table lies where something else does gets a copy: what the guest has there stays.
        Returns whether anything had to change."""
        at = start = self._header.snapshots_offset
        entries: list[bytes] = []
        table_bytes = 0
        changed = False
        for _ in range(self._header.nb_snapshots):
            at = -(-at // 8) * 8
            if at + 40 > self._overlay.size():
                break
            entry = self._read(40, at)
            id_bytes, name_bytes, extra_bytes = struct.unpack(">HH20xI", entry[12:40])
            vm_state = entry[32:36]
            extra = self._read(min(extra_bytes, _MAX_SNAPSHOT_EXTRA), at + 40)
            names = self._read(id_bytes + name_bytes, at + 40 + extra_bytes)
            at += 40 + extra_bytes + id_bytes + name_bytes
            table_bytes = -(-table_bytes // 8) * 8 + 40 + len(extra) + len(names)
            if table_bytes > _MAX_SNAPSHOT_TABLE or at - start > _MAX_SNAPSHOT_SPAN:
                break
            # Where the file ends inside it, its name is lost, and what it holds is not.
            changed = changed or at > self._overlay.size()
            if self._header.version >= 3 and len(extra) < _SNAPSHOT_EXTRA_V3:
                if len(extra) < 8:
                    extra = bytes(4) + vm_state
                extra = extra[:8] + struct.pack(">QQ", self._header.size, _NO_ICOUNT)
                changed = True
            changed = changed or len(extra) < extra_bytes
            entry = entry[:36] + struct.pack(">I", len(extra)) + extra + names
            entry += bytes(-len(entry) % 8)
            moved = self._parted_l1(looked, *struct.unpack_from(">QI", entry))
            if moved is not None:
                entry = struct.pack(">Q", moved) + entry[8:]
                changed = True
            entries.append(entry)
        if changed:
            place = self._space.put(b"".join(entries)) if entries else 0
            self._overlay.write(STEP_LINK, struct.pack(">IQ", len(entries), place), _NB_SNAPSHOTS)
        elif len(entries) < struct.unpack(">I", self._read(4, _NB_SNAPSHOTS))[0]:
            # Those that are left may stay where they are.
            self._overlay.write(STEP_LINK, struct.pack(">I", len(entries)), _NB_SNAPSHOTS)
            changed = True
        return changed

    def _parted_l1(self, looked: Checker, offset: int, n: int) -> int | None:
        """Where a snapshot's L1 table went, if it lay where something else does."""
        if offset not in looked.shared_l1 or n * 8 > _MAX_L1_BYTES:
            return None
        return self._space.put(self._read(n * 8, offset))

    # ---- bitmaps ----

    def mend_bitmaps(self) -> None:
        """Keeps the bitmaps of which the directory tells something sensible. One with a damaged
        table stays as a name, marked as not to be used: a backup that is told of no bitmap, or of
        a bad one, copies too much; one that trusts wrong bits loses data."""
        directory = self._header.bitmap_directory
        if directory is None:
            return
        offset, nbytes, count = directory
        old = self._read(nbytes, offset) if offset < self._overlay.size() else b""
        kept: list[bytes] = []
        names: set[bytes] = set()
        for entry in _bitmap_entries(old):
            if len(kept) < count and self._is_bitmap(entry, names):
                if not self._mend_bitmap_table(entry):
                    (flags,) = struct.unpack_from(">I", entry, 12)
                    struct.pack_into(">I", entry, 12, flags | _BITMAP_IN_USE)
                kept.append(bytes(entry))
        new = b"".join(kept)
        if len(kept) == count and len(new) == nbytes:
            self._overlay.write(STEP_ENTRIES, new, offset)
        elif kept:
            told = struct.pack(">IIQQ", len(kept), 0, len(new), self._space.put(new))
            self._overlay.write(STEP_LINK, told, self._extension_data(_EXT_BITMAPS))
        else:
            bits = self._header.autoclear_features & ~_AUTOCLEAR_BITMAPS & _AUTOCLEAR_KNOWN
            self._overlay.write(STEP_LINK, struct.pack(">Q", bits), _AUTOCLEAR)

    def _is_bitmap(self, entry: bytearray, names: set[bytes]) -> bool:
        table, n, flags, kind, granularity, name_bytes, extra = struct.unpack_from(
            ">QIIBBHI", entry
        )
        cluster = self._header.cluster_size
        name = bytes(entry[24 + extra : 24 + extra + name_bytes])
        sound = (
            1 <= name_bytes <= 1023
            and name not in names
            and not extra
            and kind == 1
            and 9 <= granularity <= 31
            and not flags & ~3
            and table
            and table % cluster == 0
            and 0 < n * cluster <= _MAX_BITMAP_BYTES
            and table + n * 8 <= self._overlay.size()
            and (flags & 1 or (n * cluster * 8) << granularity >= self._header.size)
        )
        names.add(name)
        return bool(sound)

    def _mend_bitmap_table(self, entry: bytearray) -> bool:
        """Empties the entries of a bitmap's table that point nowhere; whether there were none."""
        offset, n = struct.unpack_from(">QI", entry)
        cluster, size = self._header.cluster_size, self._overlay.size()
        table = list(struct.unpack(f">{n}Q", self._read(n * 8, offset)))
        sound = True
        for i, value in enumerate(table):
            data = value & _BITMAP_OFFSET
            if (
                value & _BITMAP_RESERVED
                or data
                and (value & 1 or data % cluster or data + cluster > size)
            ):
                table[i] = 0
                sound = False
        if not sound:
            self._overlay.write(STEP_ENTRIES, struct.pack(f">{n}Q", *table), offset)
        return sound

    def _extension_data(self, kind: int) -> int:
        """Where in the file the data of this header extension begins."""
        at = self._header.header_length
        for found, data in self._header.extensions:
            if found == kind:
                return at + 8
            at += 8 + -(-len(data) // 8) * 8
        raise CorruptImage(f"{self._overlay.name}: the header extension {kind:#x} is gone")


def _bitmap_entries(directory: bytes) -> Iterator[bytearray]:
    at = 0
    while at + 24 <= len(directory):
        name_bytes, extra = struct.unpack_from(">HI", directory, at + 18)
        end = at + 24 + -(-(name_bytes + extra) // 8) * 8
        if end > len(directory):
            return
        yield bytearray(directory[at:end])
        at = end
