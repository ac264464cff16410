"""Persistent dirty bitmaps: which parts of the disk were written since. Section "Bitmaps".

While an image is open for writing, enabled bitmaps are tracked: writers set bits in memory, in one
array of the finest granularity. On disk a bitmap is either valid, or marked in use. Valid bitmaps
are marked in use, durably, before the first write (``wake_bitmaps`` in ``_core/state.pyx``); at
close, and with every change of the bitmaps, the bits are merged into new clusters, a new directory
is written, and one sector of the header switches to it. A bitmap found in use when an image is
opened missed writes: it is inconsistent, and good for nothing but to be removed.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from qcow2x._core.bitmapdir import (
    FLAG_AUTO,
    FLAG_EXTRA_DATA_COMPATIBLE,
    FLAG_IN_USE,
    MAX_GRANULARITY_BITS,
    MAX_NAME_BYTES,
    MIN_GRANULARITY_BITS,
    BitmapData,
    Marks,
    decode_directory,
    encode_directory,
)
from qcow2x.errors import CorruptImage, UnsupportedFeature

if TYPE_CHECKING:
    from qcow2x._core.header import Header
    from qcow2x.image import Image
    from qcow2x.storage import Storage

#: QEMU's limits, so that an image which one opens the other opens as well.
MAX_BITMAPS = 65535
MAX_DIRECTORY_BYTES = 1024 * MAX_BITMAPS
#: 512 MiB of them, in memory while the bitmap is tracked.
MAX_BITS = 8 * (512 << 20)

_EXTENSION = 0x23852875
_AUTOCLEAR_AT = 88
_AUTOCLEAR_BITMAPS = 1
_BACKING_OFFSET_AT = 8
_HOLDS_FIXED = 1  # as overlap.pxd numbers what a cluster holds
_RUNS_AT_ONCE = 1 << 16
#: Clusters of tables that are written again just to stay next to the directory.
_MOVED_AT_MOST = 64


class Bitmap(NamedTuple):
    """One persistent bitmap, as it was when asked for."""

    name: str
    #: Bytes of the disk that one bit stands for.
    granularity: int
    #: Whether writes set bits in it.
    enabled: bool
    #: Whether it is marked in use in the file: being tracked, or left so by a writer that died.
    in_use: bool
    #: Whether it missed writes, or cannot be understood; then it can only be removed.
    inconsistent: bool
    #: Bytes of the disk that are dirty; None for an inconsistent bitmap.
    count: int | None  # type: ignore[assignment]


class BitmapExtent(NamedTuple):
    """A run of the disk, in bytes, whose bits are all set or all clear."""

    offset: int
    length: int
    dirty: bool


class _Entry(NamedTuple):
    """An entry of the directory."""

    name: bytes
    granularity_bits: int
    auto: bool
    #: Was found in use, or its table is damaged: stays marked in use.
    broken: bool
    table_offset: int
    table_entries: int
    #: Size of the disk that the table was made for.
    size: int
    extra: bytes = b""
    extra_compatible: bool = False

    @property
    def usable(self) -> bool:
        """Extra data that is not understood may say that the bits mean something else."""
        return not self.broken and (not self.extra or self.extra_compatible)

    @property
    def tracked(self) -> bool:
        return self.auto and self.usable

    @property
    def at_risk(self) -> bool:
        """A write makes it wrong, unless it is tracked; also then until it is stored."""
        return self.auto and not self.broken

    def encoded(self, in_use: bool) -> tuple[bytes, int, int, int, int, bytes]:
        flags = FLAG_IN_USE if in_use or self.broken else 0
        flags |= FLAG_AUTO if self.auto else 0
        flags |= FLAG_EXTRA_DATA_COMPATIBLE if self.extra_compatible else 0
        where = (self.table_offset, self.table_entries)
        return (self.name, self.granularity_bits, flags, *where, self.extra)

    def load(self, image: Image) -> BitmapData:
        return BitmapData.load(
            image._file,
            self.size,
            self.granularity_bits,
            image._header.cluster_bits,
            self.table_offset,
            self.table_entries,
        )


class Directory:
    """The bitmaps of an image, and the place of the directory that names them."""

    def __init__(
        self, entries: Iterable[_Entry] = (), offset: int = 0, stored: bytes = b""
    ) -> None:
        self.entries = list(entries)
        self.offset = offset
        #: Its bytes as they are in the file, but for marks of being in use that writers set.
        self.stored = stored

    def find(self, name: str, where: str) -> _Entry:
        wanted = _encode_name(name)
        for entry in self.entries:
            if entry.name == wanted:
                return entry
        raise KeyError(f"{where}: there is no bitmap named {name!r}")


def _encode_name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _directory_bytes(entries: Iterable[_Entry], in_use: Callable[[_Entry], bool]) -> bytes:
    return encode_directory([entry.encoded(in_use(entry)) for entry in entries])


def _never(_: _Entry) -> bool:
    return False


def read_directory(image: Image) -> Directory:
    """The directory in the file. Raises CorruptImage for one that breaks a rule."""
    return read_directory_of(image._file, image._header, image.size, image.name)


def read_directory_of(storage: Storage, header: Header, size: int, name: str) -> Directory:
    """The same of an image of ``size`` bytes that is only looked at."""
    place = header.bitmap_directory
    if place is None:
        return Directory()
    offset, nbytes, count = place
    raw = storage.pread(nbytes, offset) if offset < storage.size() else b""
    if len(raw) < nbytes:
        raise _damaged(name, offset, "the bitmap directory lies beyond the end of the file")
    entries = []
    decoded = decode_directory(raw, count, header.cluster_size, storage.name, offset)
    for encoded, bits, flags, table_offset, table_entries, extra in decoded:
        in_use = bool(flags & FLAG_IN_USE)
        needed = _clusters_of_bits(size, bits, header.cluster_size)
        if not in_use and table_entries != needed:
            text = encoded.decode("utf-8", "backslashreplace")
            raise _damaged(
                name, offset, f"bitmap {text!r} has {table_entries} clusters of bits, not {needed}"
            )
        entries.append(
            _Entry(
                name=encoded,
                granularity_bits=bits,
                auto=bool(flags & FLAG_AUTO),
                broken=in_use,
                table_offset=table_offset,
                table_entries=table_entries,
                size=size,
                extra=extra,
                extra_compatible=bool(flags & FLAG_EXTRA_DATA_COMPATIBLE),
            )
        )
    return Directory(entries, offset, raw)


def _clusters_of_bits(size: int, granularity_bits: int, cluster_size: int) -> int:
    bits = (size + (1 << granularity_bits) - 1) >> granularity_bits
    return -(-bits // (8 * cluster_size))


def _damaged(name: str, offset: int, what: str) -> CorruptImage:
    exc = CorruptImage(f"{name}: {what} (offset {offset:#x}, bitmap_read)")
    exc._where(name, offset, "bitmap_read")
    return exc


# ---- An image open for writing -------------------------------------------------------------------


def begin(image: Image) -> bool:
    """An image was opened for writing, and nobody else has it yet. Whether it has bitmaps."""
    found = read_directory(image)
    image._bitmaps = found
    if found.entries:
        _guard(image, found)
    _follow(image)
    return bool(found.entries)


def end(image: Image) -> None:
    """Frozen: the image is about to be closed."""
    _publish(image, [_Wanted(entry) for entry in image._bitmaps.entries])
    image._track(None)


def _guard(image: Image, directory: Directory) -> None:
    image._guard(_HOLDS_FIXED, directory.offset, len(directory.stored))
    for entry in directory.entries:
        image._guard(_HOLDS_FIXED, entry.table_offset, entry.table_entries * 8)


def guard(image: Image) -> None:
    """What the core guards was forgotten, and the bitmaps are where they were."""
    if image._bitmaps.entries:
        _guard(image, image._bitmaps)


def _follow(image: Image) -> None:
    """From now on writes are tracked for the bitmaps, which are valid in the file; frozen."""
    found = image._bitmaps
    tracked = [entry.granularity_bits for entry in found.entries if entry.tracked]
    image._track(Marks(image.size, min(tracked)) if tracked else None)
    if any(entry.at_risk for entry in found.entries):
        awake = _directory_bytes(found.entries, lambda entry: entry.at_risk)
        image._set_asleep(awake, found.offset)
    else:
        image._set_asleep(None, 0)


def mark_in_use(image: Image) -> None:
    """Marks all bitmaps of an image open for writing in use, durably, as QEMU does at once, so that
    none outlives a writer that dies. Without this the first write marks those that it concerns."""
    found = image._bitmaps
    if any(entry.at_risk and not entry.usable for entry in found.entries):
        # It would count as written to, though it may never be.
        return
    if any(entry.usable for entry in found.entries):
        with frozen(image):
            image._set_asleep(None, 0)
            marked = _directory_bytes(found.entries, lambda _: True)
            image._write_meta(marked, found.offset)
            image._barrier()
            found.stored = marked


@contextmanager
def frozen(image: Image) -> Iterator[None]:
    """No write is under way, and none begins."""
    image._freeze()
    try:
        yield
    finally:
        image._thaw()


@contextmanager
def resizing(image: Image, size: int) -> Iterator[None]:
    """Around a growth of the disk: until the bitmaps are of the new size they are in use."""
    found = image._bitmaps
    if not found.entries:
        yield
        return
    if size < image.size:
        raise UnsupportedFeature(
            f"{image.name}: cannot shrink a disk with persistent bitmaps; remove them first",
            features=("shrinking with persistent bitmaps",),
        )
    for entry in found.entries:
        if entry.usable:
            _check_bits(image, size, entry.granularity_bits)
    with frozen(image):
        store(image)
        image._set_asleep(None, 0)
        marked = _directory_bytes(found.entries, lambda _: True)
        image._write_meta(marked, found.offset)
        image._barrier()
        found.stored = marked
        tracked = [entry.granularity_bits for entry in found.entries if entry.tracked]
        image._track(Marks(size, min(tracked)) if tracked else None)
    try:
        yield
    except BaseException:
        # Where the storage failed, storing fails as well, and says less of why.
        with suppress(OSError, ValueError), frozen(image):
            store(image)
        raise
    with frozen(image):
        store(image)


def replaced(image: Image, size: int, ranges: Callable[[], Iterable[tuple[int, int]]]) -> None:
    """The disk is about to become another one of ``size`` bytes, which differs in ``ranges()``."""
    if not image._bitmaps.entries:
        return
    if size != image.size:
        raise UnsupportedFeature(
            f"{image.name}: the snapshot's disk is of another size, and persistent bitmaps cannot "
            "follow; remove them first",
            features=("change of size by a snapshot with persistent bitmaps",),
        )
    image._wake()
    marks = image._marks
    if marks is not None:
        for offset, length in ranges():
            marks.mark(offset, length)


def store(image: Image) -> None:
    """Frozen: what was written so far is in the bitmaps in the file, which are valid then."""
    _publish(image, [_Wanted(entry) for entry in image._bitmaps.entries])


# ---- Changing the file ---------------------------------------------------------------------------


class _Wanted(NamedTuple):
    """A bitmap as it is to be. ``added`` are bits to set besides those that writers did."""

    entry: _Entry
    added: Marks | None = None
    #: Begins with no bit set, whatever it held.
    fresh: bool = False


class _Job(NamedTuple):
    """A bitmap that has to be written: its bits are those of ``old`` and ``marks``."""

    index: int  # type: ignore[assignment]
    old: BitmapData
    new: BitmapData
    marks: Marks | None
    clusters: int
    #: Clusters that are free once this is done.
    freed: list[tuple[int, int]]


def _publish(image: Image, wanted: list[_Wanted]) -> None:
    """Frozen: these are the bitmaps of the image, all of them valid that can be. Durable at return;
    before the header says so nothing has changed. Raises CorruptImage, after the others are done, if
    one turned out to be damaged."""
    found = image._bitmaps
    before = {entry.name: entry for entry in found.entries}
    awake = not image._asleep and any(entry.at_risk for entry in found.entries)
    entries: list[_Entry] = []
    jobs: list[_Job] = []
    damage: CorruptImage | None = None
    for item in wanted:
        entry = item.entry
        if entry.at_risk and not entry.usable and awake:
            # Nobody could track it for those who know what its extra data means.
            entry = entry._replace(broken=True)
        elif entry.usable:
            try:
                job = _job_for(image, item, before.get(entry.name), len(entries))
            except CorruptImage as exc:
                damage, entry = damage or exc, entry._replace(broken=True)
            else:
                if job is not None:
                    jobs.append(job)
        entries.append(entry)
    kept = {entry.table_offset for entry in entries}
    gone = [entry for entry in found.entries if entry.table_offset not in kept]
    if jobs or gone or [e.name for e in entries] != [e.name for e in found.entries]:
        _write_anew(image, entries, jobs, _moves(image, entries, jobs), gone)
    else:
        found.entries = entries
        stored = _directory_bytes(entries, _never)
        if awake or stored != found.stored:
            # Only flags differ, and each entry's lie in one sector.
            image._write_meta(stored, found.offset)
            image._barrier()
            found.stored = stored
    _follow(image)
    if damage is not None:
        raise damage


def _job_for(image: Image, item: _Wanted, was: _Entry | None, index: int) -> _Job | None:
    entry = item.entry
    marks = item.added
    if marks is None and was is not None and was.tracked and not item.fresh:
        marks = image._marks
    if marks is not None and not marks:
        marks = None
    if not item.fresh and marks is None and entry.size == image.size:
        return None
    freed: list[tuple[int, int]] = []
    if item.fresh:
        old = BitmapData(
            image._file, image.size, entry.granularity_bits, image._header.cluster_bits
        )
        if was is not None:
            freed += was.load(image).clusters()
    else:
        old = entry.load(image)
    if was is not None:
        freed.append((was.table_offset, was.table_entries * 8))
    new, clusters = old.grown(image.size, marks)
    return _Job(index, old, new, marks, clusters, freed)


def _moves(image: Image, entries: list[_Entry], jobs: list[_Job]) -> list[_Job]:
    """Tables that stay as they are and move along with the directory, so that a reader finds all of
    them in one run of clusters; unless they are more than is worth writing for that."""
    written = {job.index for job in jobs}
    rest = [(i, e) for i, e in enumerate(entries) if i not in written and e.usable]
    if sum(-(-e.table_entries * 8 // image.cluster_size) for _, e in rest) > _MOVED_AT_MOST:
        return []
    moves = []
    for index, entry in rest:
        # One that turns out to be damaged stays, for whoever asks for its bits to learn of it.
        with suppress(CorruptImage):
            old = entry.load(image)
            new, _ = old.grown(image.size, None)
            table = (entry.table_offset, entry.table_entries * 8)
            moves.append(_Job(index, old, new, None, 0, [table]))
    return moves


def _write_anew(
    image: Image,
    entries: list[_Entry],
    jobs: list[_Job],
    moves: list[_Job],
    gone: list[_Entry],
) -> None:
    """A new directory, new tables and clusters for what changed; the old ones are given back. The
    moves are left out where room is short."""
    found = image._bitmaps
    cluster = image.cluster_size

    def whole(nbytes: int) -> int:
        return -(-nbytes // cluster) * cluster

    freed = [(found.offset, len(found.stored))] if found.offset else []
    for entry in gone:
        freed.append((entry.table_offset, entry.table_entries * 8))
        try:
            # One in use may be of a disk of another size.
            freed += _clusters_of(image, entry)
        except CorruptImage:
            # Better that its clusters leak than that something else's are given away.
            continue
    directory_bytes = len(_directory_bytes(entries, _never))
    if len(entries) > MAX_BITMAPS or directory_bytes > MAX_DIRECTORY_BYTES:
        raise UnsupportedFeature(
            f"{image.name}: the bitmap directory is full",
            features=(f"more than {MAX_BITMAPS} bitmaps",),
        )
    # The directory, all the tables, then the bits.
    all_jobs = sorted([*jobs, *moves], key=lambda job: job.index)
    tables = sum(whole(job.new.entries * 8) for job in all_jobs)
    total = whole(directory_bytes) + tables + sum(job.clusters for job in all_jobs) * cluster
    try:
        base = image._reserve(total)
    except OSError as exc:
        if not moves or exc.errno != errno.ENOSPC:
            raise
        _write_anew(image, entries, jobs, [], gone)
        return
    table_at = base + whole(directory_bytes)
    at = table_at + tables
    try:
        for job in all_jobs:
            table_offset, table_at = table_at, table_at + whole(job.new.entries * 8)
            written, unused = job.new.write_changed(job.old, job.marks, at)
            at += written * cluster
            job.freed.extend(unused)
            image._write_meta(job.new.encode_table(), table_offset)
            entries[job.index] = entries[job.index]._replace(
                table_offset=table_offset,
                table_entries=job.new.entries,
                size=image.size,
            )
        stored = _directory_bytes(entries, _never)
        if stored:
            image._write_meta(stored, base)
        # Edge: all of it before the header that points to it.
        image._barrier()
    except BaseException:
        image._unreserve(base, total)
        raise
    try:
        _point_header(image, base, len(stored), len(entries))
    except UnsupportedFeature:
        # Refused before the header changed. After any other failure nobody knows which directory it
        # points to, and both stay.
        image._unreserve(base, total)
        raise
    for job in all_jobs:
        freed += job.freed
    freed.append((at, base + total - at))
    image._bitmaps = Directory(entries, base if stored else 0, stored)
    if stored:
        _guard(image, image._bitmaps)
    for offset, nbytes in freed:
        image._unreserve(offset, nbytes)
    image.flush()


def _clusters_of(image: Image, entry: _Entry) -> list[tuple[int, int]]:
    # Any size does that makes for a table as long as this one.
    cluster_bits = image._header.cluster_bits
    size = entry.table_entries << (cluster_bits + 3 + entry.granularity_bits)
    return entry._replace(size=size).load(image).clusters()


def _point_header(image: Image, offset: int, nbytes: int, count: int) -> None:
    """The switch to another directory. A sector is written whole or not at all, so each step here
    leaves a header that says what the one before said, or the next."""
    header = image._header
    data = struct.pack(">IIQQ", count, 0, nbytes, offset) if count else None
    valid = header.bitmap_directory is not None
    at, kind_after, end_at = _find_extension(image)
    if data is None:
        _set_autoclear(image, False)
        if at is not None and kind_after == 0:
            image._patch_header(at, bytes(8))
        header.use_bitmaps(None)
        return
    if at is None:
        at = _insert_extension(image, end_at, data)
    elif not valid or (at + 8) // 512 == (at + 31) // 512:
        image._patch_header(at + 8, data)
    else:
        _set_autoclear(image, False)
        image._patch_header(at + 8, data)
    _set_autoclear(image, True)
    header.use_bitmaps(data)


def _set_autoclear(image: Image, bitmaps: bool) -> None:
    (bits,) = struct.unpack(">Q", image._file.pread(8, _AUTOCLEAR_AT))
    wanted = bits | _AUTOCLEAR_BITMAPS if bitmaps else bits & ~_AUTOCLEAR_BITMAPS
    if wanted != bits:
        image._patch_header(_AUTOCLEAR_AT, struct.pack(">Q", wanted))


def _find_extension(image: Image) -> tuple[int | None, int | None, int | None]:
    """Where the bitmaps extension begins, the kind of the one behind it, and where the mark of the
    end is; each None if there is none."""
    header = image._header
    cluster = image._file.pread(header.cluster_size, 0).ljust(header.cluster_size, b"\0")
    (backing,) = struct.unpack_from(">Q", cluster, _BACKING_OFFSET_AT)
    limit = backing or len(cluster)
    at, found, after = header.header_length, None, None
    while at + 8 <= limit:
        kind, nbytes = struct.unpack_from(">II", cluster, at)
        if found is not None and after is None:
            after = kind
        if kind == 0:
            return found, after, at
        if kind == _EXTENSION:
            if nbytes != 24:
                raise _no_room(image, f"has a bitmaps extension of {nbytes} bytes")
            found = at
        at += 8 + (nbytes + 7) // 8 * 8
    return found, after, None


def _insert_extension(image: Image, end_at: int | None, data: bytes) -> int:
    """Behind the last extension: first all that lies past the mark of the end, then the mark itself
    becomes the head of the new one. Returns where it begins."""
    header = image._header
    if end_at is None:
        raise _no_room(image, "has no room for another extension")
    (backing,) = struct.unpack(">Q", image._file.pread(8, _BACKING_OFFSET_AT))
    (length,) = struct.unpack(">I", image._file.pread(4, 16))
    following = end_at + 8 + len(data)
    if backing and backing < following + 8:
        # The backing file's name is in the way: first a copy further down.
        name = image._file.pread(length, backing)
        moved = (max(following + 8, backing + length) + 7) // 8 * 8
        if moved + length > header.cluster_size:
            raise _no_room(image, "has no room for the bitmaps extension")
        image._patch_header(moved, name)
        image._patch_header(_BACKING_OFFSET_AT, struct.pack(">Q", moved))
    elif following + 8 > header.cluster_size:
        raise _no_room(image, "has no room for the bitmaps extension")
    image._patch_header(end_at + 8, data + bytes(8))
    image._patch_header(end_at, struct.pack(">II", _EXTENSION, len(data)))
    return end_at


def _no_room(image: Image, what: str) -> UnsupportedFeature:
    return UnsupportedFeature(
        f"{image.name}: the header cluster {what}", features=("persistent bitmaps",)
    )


def _check_bits(image: Image, size: int, granularity_bits: int) -> None:
    bits = (size + (1 << granularity_bits) - 1) >> granularity_bits
    if bits > MAX_BITS:
        raise ValueError(
            f"{image.name}: Too much space will be occupied by the bitmap. Use larger granularity"
        )
    if not bits:
        raise ValueError(f"{image.name}: a disk without a byte has no use for a bitmap")


# ---- What users hold -----------------------------------------------------------------------------


class Bitmaps(Mapping[str, Bitmap]):
    """The persistent bitmaps of an open image, by name: ``image.bitmaps``.

    Looking one up counts its bits; names alone cost nothing. What changes the bitmaps needs mode
    ``"r+"``; writers wait meanwhile, readers do not. Each change is durable at return, with the bits
    that were set by then, and whole or not there after a cut of power. Names are up to 1023 bytes of
    UTF-8; those that begin with ``.qcow2x-checkpoint:`` belong to a checkpoint of several images that
    a crash interrupted (:func:`qcow2x.settle_checkpoints`). An inconsistent bitmap raises CorruptImage from all but ``remove``. Any number of threads.
    """

    def __init__(self, image: Image) -> None:
        self._image = image

    def _directory(self) -> Directory:
        image = self._image
        return image._bitmaps if image.writable else read_directory(image)

    def __getitem__(self, name: str) -> Bitmap:
        image = self._image
        with image._exclusive:
            entry = self._directory().find(name, image.name)
            count = None
            if entry.usable:
                count = entry.load(image).dirty_bytes(self._marks_of(entry))
            tracking = entry.at_risk and image.writable and not image._asleep
            return Bitmap(
                name=name,
                granularity=1 << entry.granularity_bits,
                enabled=entry.auto,
                in_use=entry.broken or tracking,
                inconsistent=not entry.usable,
                count=count,
            )

    def __iter__(self) -> Iterator[str]:
        names = [entry.name for entry in self._directory().entries]
        return iter([name.decode("utf-8", "surrogateescape") for name in names])

    def __len__(self) -> int:
        return len(self._directory().entries)

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)

    def layout(self) -> list[tuple[str, int, bool]]:
        """Name, granularity and whether it is inconsistent, of every bitmap in the order of the
        file. No bits are looked at."""
        return [
            (
                entry.name.decode("utf-8", "surrogateescape"),
                1 << entry.granularity_bits,
                not entry.usable,
            )
            for entry in self._directory().entries
        ]

    def _marks_of(self, entry: _Entry) -> Marks | None:
        return self._image._marks if entry.tracked and self._image.writable else None

    # ---- Reading ----

    def extents(
        self, name: str, offset: int = 0, length: int | None = None
    ) -> Iterator[BitmapExtent]:
        """The runs of dirty and of clean parts of the disk, from ``offset`` on, in bytes. Reads the
        bits as it goes, a few megabytes at a time. Writes done before the call are in it."""
        image = self._image
        end = image.size if length is None else offset + length
        if offset < 0 or end < offset or end > image.size:
            raise ValueError(f"{image.name}: extents of a range outside the disk")
        self._usable(name)
        return self._walk(name, offset, end)

    def _walk(self, name: str, offset: int, end: int) -> Iterator[BitmapExtent]:
        image = self._image
        last: BitmapExtent | None = None
        data: BitmapData | None = None
        seen: _Entry | None = None
        at = offset
        while at < end:
            with image._exclusive:
                entry = self._usable(name)
                if data is None or entry != seen:
                    data, seen = entry.load(image), entry
                granule = 1 << entry.granularity_bits
                runs, following = data.runs(
                    at // granule * granule, self._marks_of(entry), _RUNS_AT_ONCE
                )
            for start, nbytes, dirty in runs:
                stop = min(start + nbytes, end)
                start = max(start, at)
                if start >= stop:
                    continue
                if last is not None and last.dirty == dirty:
                    last = last._replace(length=stop - last.offset)
                    continue
                if last is not None:
                    yield last
                last = BitmapExtent(start, stop - start, dirty)
            at = following
        if last is not None:
            yield last

    def require_usable(self, name: str) -> None:
        """Raises KeyError if there is no such bitmap, CorruptImage if it is inconsistent."""
        self._usable(name)

    def to_bytes(self, name: str) -> bytes:
        """All bits, the first in the least significant bit of the first byte: 2 MiB for a disk of 1
        TiB at the default granularity."""
        image = self._image
        with image._exclusive:
            entry = self._usable(name)
            bits = (image.size - 1 >> entry.granularity_bits) + 1
            return entry.load(image).bits_at(0, (bits + 7) // 8, self._marks_of(entry))

    # ---- Changing ----

    def add(self, name: str, granularity: int = 65536, enabled: bool = True) -> Bitmap:
        """Makes a bitmap without a bit set. ``granularity`` is a power of two from 512 to 2 GiB.

        Raises ValueError for a name or granularity out of range or a name that is taken,
        UnsupportedFeature for version 2 images and where the directory or header is full.
        """
        image = self._image
        with self._changing():
            add(image, name, granularity, enabled)
        return self[name]

    def remove(self, name: str) -> None:
        """Removes a bitmap, also an inconsistent one. Raises KeyError."""
        with self._changing():
            remove(self._image, name)

    def clear(self, name: str) -> None:
        """Clears every bit. Raises KeyError."""
        with self._changing():
            entry = self._usable(name)
            self._publish_with(_Wanted(entry, fresh=True))

    def enable(self, name: str) -> None:
        """Writes from now on set bits in it. Raises KeyError."""
        with self._changing():
            self._publish_with(_Wanted(self._usable(name)._replace(auto=True)))

    def disable(self, name: str) -> None:
        """Writes from now on leave it as it is. Raises KeyError."""
        with self._changing():
            self._publish_with(_Wanted(self._usable(name)._replace(auto=False)))

    def merge(self, target: str, sources: Iterable[str | tuple[Image, str]]) -> None:
        """Sets in ``target`` every bit that is set in one of ``sources``: names of this image, or
        ``(image, name)`` for those of another one, whose disk must be of the same size. The
        granularities may differ: a bit stands for all it covers. Raises KeyError, ValueError."""
        image = self._image
        named = [(image, source) if isinstance(source, str) else source for source in sources]
        added = Marks(image.size, self._usable(target).granularity_bits)
        for other, name in named:
            if other.size != image.size:
                raise ValueError(
                    f"{image.name}: bitmap {name!r} of {other.name} is for a disk of "
                    f"{other.size} bytes, not {image.size}"
                )
            # Before this image is held: two that merge from each other must not wait in a ring.
            for extent in Bitmaps(other).extents(name):
                if extent.dirty:
                    added.mark(extent.offset, extent.length)
        with self._changing():
            entry = self._usable(target)
            if (image.size, entry.granularity_bits) != (added.size, added.granularity_bits):
                raise KeyError(f"{image.name}: bitmap {target!r} was replaced meanwhile")
            self._publish_with(_Wanted(entry, added=added))

    def store(self) -> None:
        """Brings the file's bitmaps up to date, and valid: should the process die before the next
        write they are as they should be. Closing the image does this as well."""
        with self._changing():
            store(self._image)

    def _usable(self, name: str) -> _Entry:
        entry = self._directory().find(name, self._image.name)
        if not entry.usable:
            why = "was not stored by its last writer" if entry.broken else "has unknown extra data"
            raise _damaged(
                self._image.name,
                entry.table_offset,
                f"bitmap {name!r} {why}; it can only be removed",
            )
        return entry

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone, with all that was written before in the bitmaps."""
        image = self._image
        with image._exclusive:
            if not image.writable:
                raise PermissionError(f"{image.name}: is open read-only")
            with frozen(image):
                # A bitmap that begins now must not call clean what a cut of power would undo.
                image.flush()
                store(image)
                yield

    def _publish_with(self, changed: _Wanted) -> None:
        wanted = []
        for entry in self._image._bitmaps.entries:
            wanted.append(changed if entry.name == changed.entry.name else _Wanted(entry))
        _publish(self._image, wanted)


def add(image: Image, name: str, granularity: int, enabled: bool) -> None:
    """Frozen, stored: a new bitmap."""
    encoded = _encode_name(name)
    if not 1 <= len(encoded) <= MAX_NAME_BYTES or b"\0" in encoded:
        raise ValueError(
            f"{image.name}: a bitmap's name has 1 to {MAX_NAME_BYTES} bytes, not {name!r}"
        )
    bits = granularity.bit_length() - 1
    powers = range(MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS + 1)
    if bits not in powers or granularity != 1 << bits:
        raise ValueError(
            f"{image.name}: Granularity must be power of 2 and at least 512, and at most {1 << 31}"
            if granularity > 1 << 31
            else f"{image.name}: Granularity must be power of 2 and at least 512"
        )
    if image._header.version < 3:
        raise UnsupportedFeature(
            f"{image.name}: version 2 (compat 0.10) has no persistent bitmaps",
            features=("persistent bitmaps in version 2",),
        )
    entries = image._bitmaps.entries
    if any(entry.name == encoded for entry in entries):
        raise ValueError(f"{image.name}: Bitmap already exists: {name}")
    _check_bits(image, image.size, bits)
    made = _Entry(encoded, bits, enabled, False, 0, 0, image.size)
    _publish(image, [*map(_Wanted, entries), _Wanted(made, fresh=True)])


def rename(image: Image, old: str, new: str) -> None:
    """Frozen, stored: another name for a bitmap, free at the time."""
    found = image._bitmaps
    entry = found.find(old, image.name)
    renamed = entry._replace(name=_encode_name(new))
    wanted = [_Wanted(renamed if e is entry else e) for e in found.entries]
    _publish(image, wanted)


def remove(image: Image, name: str) -> None:
    """Frozen, stored."""
    found = image._bitmaps
    gone = found.find(name, image.name)
    _publish(image, [_Wanted(e) for e in found.entries if e is not gone])
