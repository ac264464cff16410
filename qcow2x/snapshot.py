"""Internal snapshots: the table in the image, and the objects over it. Section "Snapshots"."""

from __future__ import annotations

import errno as _errno
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, overload

from qcow2x import bitmap as _bitmap
from qcow2x._core.header import Header
from qcow2x.errors import CorruptImage, FormatError, ImageBroken, Qcow2Error, UnsupportedFeature

if TYPE_CHECKING:
    from datetime import datetime

    from qcow2x.image import Image
    from qcow2x.storage import Storage

#: QEMU's limits, so that an image which one opens the other opens as well.
MAX_SNAPSHOTS = 65536
MAX_TABLE_BYTES = 1024 * MAX_SNAPSHOTS
MAX_EXTRA_BYTES = 1024
MAX_L1_BYTES = 32 << 20

#: The ``site`` of an error that says where a snapshot's L1 table cannot be.
SITE_L1 = "snapshot_l1"

_FIXED = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQQ")
#: No icount was recorded.
_NO_ICOUNT = (1 << 64) - 1


class Snapshot(NamedTuple):
    """One entry of the snapshot table."""

    id: str
    name: str
    #: When it was made, seconds and nanoseconds since the epoch.
    date_sec: int
    date_nsec: int
    #: How long the guest had been running, nanoseconds.
    vm_clock_nsec: int
    #: Bytes of machine state saved with it; 0 for a disk-only snapshot.
    vm_state_size: int
    #: Size of the disk in it, bytes.
    disk_size: int
    #: Instructions executed, for record and replay; None where not recorded.
    icount: int | None
    l1_offset: int
    #: Entries of its L1 table.
    l1_size: int
    #: Extra data of the entry past what is known here, kept as it is.
    unknown_extra: bytes = b""
    #: Bytes of extra data that the entry has on disk; version 3 asks for at least 16.
    extra_size: int = _EXTRA.size

    @property
    def date(self) -> datetime:
        """When it was made, in UTC, to the microsecond."""
        from datetime import datetime, timezone

        made = datetime.fromtimestamp(self.date_sec, timezone.utc)
        return made.replace(microsecond=self.date_nsec // 1000 % 1_000_000)


def read_table(storage: Storage, header: Header) -> list[Snapshot]:
    """The snapshot table. Raises CorruptImage with the table's offset for one that is damaged,
    FormatError for one past the limits, which a repair can put right; takes memory for the entries
    only."""
    n, at = header.nb_snapshots, header.snapshots_offset
    if n == 0:
        return []
    if n > MAX_SNAPSHOTS:
        raise FormatError(f"{storage.name}: {n} snapshots are more than {MAX_SNAPSHOTS}")
    end = at + MAX_TABLE_BYTES
    found = []
    for index in range(n):
        snapshot, entry_end = _read_entry(storage, header, at, index)
        if entry_end > end:
            raise _past_limits(
                storage,
                at,
                "Snapshot table is too big",
                f"You can force-remove all {n - index} overhanging snapshots",
            )
        found.append(snapshot)
        at = -(-entry_end // 8) * 8
    return found


def _read_entry(storage: Storage, header: Header, at: int, index: int) -> tuple[Snapshot, int]:
    """The entry at an offset, and where it ends."""
    fixed = storage.pread(_FIXED.size, at)
    if len(fixed) < _FIXED.size:
        raise _damaged(storage, at, "ends inside an entry")
    l1_offset, l1_size, id_size, name_size, sec, nsec, clock, state32, extra_size = _FIXED.unpack(
        fixed
    )
    if extra_size > MAX_EXTRA_BYTES:
        raise _past_limits(
            storage,
            at,
            f"Too much extra metadata in snapshot table entry {index}",
            "You can force-remove this extra metadata",
        )
    rest_size = extra_size + id_size + name_size
    rest = storage.pread(rest_size, at + _FIXED.size)
    if len(rest) < rest_size:
        raise _damaged(storage, at, "ends inside an entry")
    extra = rest[:extra_size]
    state, disk, icount = _EXTRA.unpack(extra[: _EXTRA.size].ljust(_EXTRA.size, b"\xff"))
    snapshot = Snapshot(
        id=rest[extra_size : extra_size + id_size].decode("utf-8", "surrogateescape"),
        name=rest[extra_size + id_size :].decode("utf-8", "surrogateescape"),
        date_sec=sec,
        date_nsec=nsec,
        vm_clock_nsec=clock,
        vm_state_size=state if extra_size >= 8 else state32,
        disk_size=disk if extra_size >= 16 else header.size,
        icount=icount if extra_size >= 24 and icount != _NO_ICOUNT else None,
        l1_offset=l1_offset,
        l1_size=l1_size,
        unknown_extra=extra[_EXTRA.size :],
        extra_size=extra_size,
    )
    return snapshot, at + _FIXED.size + rest_size


def _damaged(storage: Storage, at: int, what: str) -> CorruptImage:
    exc = CorruptImage(f"{storage.name}: the snapshot table {what} (offset {at:#x})")
    exc.path, exc.offset = storage.name, at
    return exc


def _past_limits(storage: Storage, at: int, what: str, remedy: str) -> Qcow2Error:
    exc = FormatError(f"{storage.name}: {what} (offset {at:#x})")
    exc.what, exc.hint = what, f"{remedy} with qemu-img check -r all"
    return exc._where(storage.name, at, None)


def check_limits(storage: Storage, header: Header) -> None:
    """Raises FormatError, with QEMU's words, for a snapshot table past the limits. One that is
    damaged otherwise keeps nobody from the disk."""
    with suppress(CorruptImage):
        read_table(storage, header)


def check_l1(name: str, header: Header, snapshot: Snapshot) -> None:
    """Raises FormatError for a snapshot whose L1 table is past the limits, CorruptImage where none
    can lie; both with the site ``SITE_L1``."""
    nbytes = snapshot.l1_size * 8
    exc: Qcow2Error
    if nbytes > MAX_L1_BYTES:
        what = "Snapshot L1 table too large"
        exc = FormatError(f"{name}: {what} ({nbytes} bytes)")
    elif snapshot.l1_offset % header.cluster_size or snapshot.l1_offset >> 56:
        what = "Snapshot L1 table offset invalid"
        exc = CorruptImage(f"{name}: {what} ({snapshot.l1_offset:#x})")
    else:
        return
    exc.what = what
    raise exc._where(name, snapshot.l1_offset, SITE_L1)


def encode_table(snapshots: Sequence[Snapshot], version: int) -> bytes:
    """The table's bytes. An entry keeps the amount of extra data it had; in version 3, which asks
    for 16 bytes, it has all that is known here."""
    out = bytearray()
    for entry in snapshots:
        ident = entry.id.encode("utf-8", "surrogateescape")
        name = entry.name.encode("utf-8", "surrogateescape")
        icount = _NO_ICOUNT if entry.icount is None else entry.icount
        extra = _EXTRA.pack(entry.vm_state_size, entry.disk_size, icount)
        size = max(entry.extra_size, _EXTRA.size if version >= 3 else 0)
        extra = extra[: min(size, _EXTRA.size)] + entry.unknown_extra
        state32 = min(entry.vm_state_size, 0xFFFFFFFF)
        out += _FIXED.pack(
            entry.l1_offset,
            entry.l1_size,
            len(ident),
            len(name),
            entry.date_sec,
            entry.date_nsec,
            entry.vm_clock_nsec,
            state32,
            len(extra),
        )
        out += extra + ident + name
        out += bytes(-len(out) % 8)
    return bytes(out)


def find(snapshots: Sequence[Snapshot], key: str, where: str) -> Snapshot:
    """The snapshot with this id, else the one with this name; KeyError if there is none."""
    for attribute in ("id", "name"):
        for snapshot in snapshots:
            if getattr(snapshot, attribute) == key:
                return snapshot
    raise KeyError(f"{where}: there is no snapshot with the id or name {key!r}")


def header_at(header: Header, snapshot: Snapshot, name: str) -> Header:
    """A header through which the disk is seen as the snapshot holds it. Raises as check_l1 does."""
    check_l1(name, header, snapshot)
    seen = Header.parse(header.encode(), None, name)
    seen.set_tables(
        header.refcount_table_offset,
        header.refcount_table_clusters,
        snapshot.l1_offset,
        snapshot.l1_size,
    )
    seen.set_size(snapshot.disk_size)
    # Bitmaps are of the live disk.
    seen.use_bitmaps(None)
    return seen


def _bytes_in_file(table: Sequence[Snapshot]) -> int:
    # Version 2 adds no extra data that an entry did not have.
    return len(encode_table(table, 2))


# What a cluster holds, as overlap.pxd numbers it.
_HOLDS_FIXED, _HOLDS_SNAPSHOT_L1, _HOLDS_SNAPSHOT_L2 = 1, 4, 5


def guard_tables(image: Image, every_l2: bool) -> None:
    """Has the image guard what its snapshots hold. A table that cannot be read guards nothing: the
    image can still be used, and check says what is wrong. Where every L2 table is to be guarded and
    a snapshot's cannot be found, nothing is written at all."""
    header, storage = image._header, image._file
    if header.nb_snapshots == 0:
        return
    try:
        table = read_table(storage, header)
    except (FormatError, CorruptImage):
        if header.snapshots_offset >= storage.size():
            # The file ends before it: nothing is put there, to be read as snapshots one day.
            image._guard(_HOLDS_FIXED, header.snapshots_offset, header.nb_snapshots * _FIXED.size)
        return
    image._guard(_HOLDS_FIXED, header.snapshots_offset, _bytes_in_file(table))
    for entry in table:
        try:
            check_l1(image.name, header, entry)
        except (FormatError, CorruptImage) as exc:
            if every_l2:
                image._refuse_writes(
                    _errno.EFBIG if isinstance(exc, FormatError) else _errno.EINVAL
                )
            continue
        image._guard(_HOLDS_SNAPSHOT_L1, entry.l1_offset, entry.l1_size * 8)
        if every_l2:
            l1 = storage.pread(entry.l1_size * 8, entry.l1_offset)
            for (l2,) in struct.iter_unpack(">Q", l1[: len(l1) // 8 * 8]):
                if offset := l2 & 0x00FFFFFFFFFFFE00:
                    image._guard(_HOLDS_SNAPSHOT_L2, offset, header.cluster_size)


class Snapshots(Sequence[Snapshot]):
    """The internal snapshots of an open image, in the order of the table: ``image.snapshots``.

    A sequence of :class:`Snapshot`. What changes the table needs mode ``"r+"``; writers wait
    meanwhile, readers do not. Each change is durable at return, and whole or not there after a cut
    of power. A snapshot is named by its id or, where no id is like that, its name.
    """

    def __init__(self, image: Image) -> None:
        self._image = image

    def _table(self) -> list[Snapshot]:
        # Not while somebody puts another table in its place.
        with self._image._exclusive:
            return read_table(self._image._file, self._image._header)

    @overload
    def __getitem__(self, index: int) -> Snapshot: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Snapshot]: ...
    def __getitem__(self, index: int | slice) -> Snapshot | Sequence[Snapshot]:
        return self._table()[index]

    def __len__(self) -> int:
        return self._image._header.nb_snapshots

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._table())

    def get(self, key: str) -> Snapshot:
        """The snapshot with this id or name. Raises KeyError."""
        return find(self._table(), key, self._image.name)

    def create(self, name: str, *, icount: int | None = None) -> Snapshot:
        """Makes a snapshot of the disk as it is, everything written before included. ``icount`` is
        the number of instructions that the guest has executed, where somebody counted them.

        Raises ValueError for a name that is empty or too long, UnsupportedFeature where refcounts
        are too narrow to count one more reference, or the table is full.
        """
        image = self._image
        encoded = name.encode("utf-8", "surrogateescape")
        if not encoded or len(encoded) > 0xFFFF or b"\0" in encoded:
            raise ValueError(f"{image.name}: not a name for a snapshot: {name!r}")
        with image._exclusive:
            self._need_writable()
            header = image._header
            if header.has_data_file:
                raise UnsupportedFeature(
                    f"{image.name}: an image with an external data file has no snapshots",
                    features=("snapshots with an external data file",),
                )
            if header.refcount_bits == 1:
                raise UnsupportedFeature(
                    f"{image.name}: refcounts of 1 bit cannot count a snapshot's references",
                    features=("snapshots with 1-bit refcounts",),
                )
            if header.nb_snapshots >= MAX_SNAPSHOTS:
                raise self._full()
            table = self._table()
            old = (header.snapshots_offset, _bytes_in_file(table))
            numbers = [int(entry.id) for entry in table if entry.id.isdecimal()]
            now = time.time_ns()
            made = Snapshot(
                id=str(max(numbers, default=0) + 1),
                name=name,
                date_sec=now // 10**9 & 0xFFFFFFFF,
                date_nsec=now % 10**9,
                vm_clock_nsec=0,
                vm_state_size=0,
                disk_size=image.size,
                icount=icount,
                l1_offset=image._reserve(header.l1_size * 8),
                l1_size=header.l1_size,
            )
            table.append(made)
            encoded_table = self._encode(table)
            with (
                self._reserved(made.l1_size * 8, made.l1_offset),
                self._reserved(len(encoded_table)) as table_off,
                self._step(),
            ):
                image._snapshot_create(made.l1_offset, encoded_table, table_off, len(table), old)
            # The old table's clusters become free with the flush.
            image.flush()
        return made

    def delete(self, key: str) -> None:
        """Deletes a snapshot and gives back what only it held. Raises KeyError."""
        image = self._image
        with image._exclusive:
            self._need_writable()
            table = self._table()
            gone = find(table, key, image.name)
            check_l1(image.name, image._header, gone)
            old = (image._header.snapshots_offset, _bytes_in_file(table))
            table.remove(gone)
            encoded_table = self._encode(table)
            with self._reserved(len(encoded_table)) as table_off, self._step():
                image._snapshot_delete(
                    gone.l1_offset, gone.l1_size, encoded_table, table_off, len(table), old
                )

    def _complete_fields(self) -> None:
        """Gives each entry the fields that version 3 asks for, before the image becomes that."""
        image = self._image
        table = self._table()
        if all(entry.extra_size >= _EXTRA.size for entry in table):
            return
        old = (image._header.snapshots_offset, _bytes_in_file(table))
        encoded_table = encode_table(table, 3)
        with self._reserved(len(encoded_table)) as table_off, self._step():
            # As if a snapshot that holds nothing were deleted.
            image._snapshot_delete(0, 0, encoded_table, table_off, len(table), old)

    def apply(self, key: str) -> None:
        """Makes the disk what it was when the snapshot was made, also its size. What was written
        since is lost, unless another snapshot holds it. Raises KeyError."""
        image = self._image
        with image._exclusive:
            self._need_writable()
            wanted = self.get(key)
            check_l1(image.name, image._header, wanted)
            _bitmap.replaced(image, wanted.disk_size, lambda: self.diff(key))
            entries = max(wanted.l1_size, image._l1_entries_for(wanted.disk_size))
            if entries * 8 > MAX_L1_BYTES:
                raise CorruptImage(
                    f"{image.name}: snapshot {key!r} says that its disk has {wanted.disk_size} "
                    "bytes, which no L1 table can map"
                )
            with self._reserved(entries * 8) as l1_off, self._step():
                image._snapshot_apply(
                    wanted.l1_offset, wanted.l1_size, l1_off, entries, wanted.disk_size
                )

    def open(self, key: str) -> Image:
        """The disk as the snapshot holds it, read-only; several may be open at once. It reads the
        file of this image and must be closed before it, and before the snapshot is deleted."""
        from qcow2x.image import Image

        image = self._image
        wanted = self.get(key)
        if image.writable:
            # What a snapshot holds was durable when it was made: it is read from an image that
            # takes no more writes, or has no room for them, as well.
            try:
                image.flush()
            except OSError as exc:
                if not isinstance(exc, ImageBroken) and exc.errno != _errno.ENOSPC:
                    raise
        header = header_at(image._header, wanted, image.name)
        return Image(
            image._file,
            header,
            backing=image._backing,
            data=image._data if header.has_data_file else None,
            cipher=image._cipher,
        )

    def diff(self, a: str, b: str | None = None) -> Iterator[tuple[int, int]]:
        """The ranges ``(offset, length)`` in which two snapshots (or one and the disk as it is, for
        ``b=None``) may differ, from metadata alone: what is stored in the same place is the same.
        Past the end of the shorter disk everything differs."""
        with self.open(a) as first:
            if b is None:
                yield from differences(first, self._image)
            else:
                with self.open(b) as second:
                    yield from differences(first, second)

    @contextmanager
    def _reserved(self, nbytes: int, host_off: int | None = None) -> Iterator[int]:
        """Clusters for a table, given back if what they are for comes to nothing."""
        if host_off is None:
            host_off = self._image._reserve(nbytes)
        try:
            yield host_off
        except (FormatError, CorruptImage):
            # Refused before anything was changed; else the image is poisoned, and what was reserved
            # is leaked for a repair to find, as after any other failure.
            self._image._unreserve(host_off, nbytes)
            with suppress(ImageBroken):
                self._image.flush()
            raise

    def _encode(self, table: list[Snapshot]) -> bytes:
        encoded = encode_table(table, self._image._header.version)
        if len(table) > MAX_SNAPSHOTS or len(encoded) > MAX_TABLE_BYTES:
            raise self._full()
        return encoded

    def _full(self) -> UnsupportedFeature:
        return UnsupportedFeature(
            f"{self._image.name}: the snapshot table is full",
            features=(f"more than {MAX_SNAPSHOTS} snapshots",),
        )

    def _need_writable(self) -> None:
        if not self._image.writable:
            raise PermissionError(f"{self._image.name}: is open read-only")
        if self._image._half_done:
            self._image._finish_half_done()

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Lack of room in the middle is mended at once if there is room for that; else with the next
        change of the snapshots."""
        try:
            yield
        except OSError:
            if self._image._half_done:
                with suppress(OSError):
                    self._image._finish_half_done()
            raise


def differences(a: Image, b: Image) -> Iterator[tuple[int, int]]:
    """Ranges in which the mappings of two views of one file differ."""
    end = min(a.size, b.size)
    start = 0
    open_at: int | None = None
    left, right = _mapping(a, end), _mapping(b, end)
    x, y = next(left, None), next(right, None)
    while x is not None and y is not None:
        stop = min(x[1], y[1])
        same = x[2] == y[2] and (
            x[3] == y[3] if x[3] is None or y[3] is None else x[3] - x[0] == y[3] - y[0]
        )
        if same and open_at is not None:
            yield open_at, start - open_at
            open_at = None
        elif not same and open_at is None:
            open_at = start
        start = stop
        if x[1] == stop:
            x = next(left, None)
        if y[1] == stop:
            y = next(right, None)
    longest = max(a.size, b.size)
    if open_at is None and longest > end:
        open_at = end
    if open_at is not None:
        yield open_at, max(longest, end) - open_at


def _mapping(image: Image, end: int) -> Iterator[tuple[int, int, int, int | None]]:
    """(start, end, kind, host offset or None) of this layer alone."""
    at = 0
    while at < end:
        for start, nbytes, kind, host in image._plan(at, end - at):
            # Zeros are zeros wherever a cluster is kept for them; a compressed cluster has one
            # place for all of its bytes.
            place: int | None = host
            if kind in (0, 2):
                place = None
            elif kind == 3:
                place = host + start
            yield start, start + nbytes, kind, place
            at = start + nbytes
