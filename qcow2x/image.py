"""Image: the object that users hold."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from qcow2x import backing as _backing
from qcow2x import bitmap as _bitmap
from qcow2x import snapshot as _snapshot
from qcow2x._core.header import Header
from qcow2x._core.image import CoreImage
from qcow2x._core.opening import check_mode
from qcow2x.errors import CorruptImage, FormatError, UnsupportedFeature
from qcow2x.locking import ImageLock, lock_image
from qcow2x.storage import FileStorage, Storage, open_storage
from qcow2x.types import CheckResult, Extent, ImageInfo, Progress, Stats

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

    from qcow2x._core.crypto import SectorCipher
    from qcow2x.backing import ReferencePolicy
    from qcow2x.encryption import KeySource
    from qcow2x.storage import Source

# Kinds of runs, as in include/qcow2x/plan.h.
_UNALLOCATED, _DATA, _ZERO, _COMPRESSED = range(4)

PREALLOCATIONS = ("off", "metadata", "falloc", "full")
#: Bytes up to which space is reserved by writing zeros to it. What is only reserved is cut in
#: pieces by the writes that follow, and the host may need a block to keep account of these.
_WRITTEN_RATHER = 1 << 20


def open(
    source: Source,
    mode: str = "r",
    *,
    references: ReferencePolicy = "deny",
    cache: str = "writeback",
    snapshot: str | None = None,
    key: KeySource | None = None,
    lock: bool = True,
    l2_cache_size: int | None = None,
    backing: Source | _backing.GuestDisk | bool | None = None,
    data_file: Source | bool | None = None,
    overlap_check: str = "cached",
    discard_to_host: bool = True,
    lazy_refcounts: bool | None = None,
    growth: str = "auto",
) -> Image:
    """Opens a qcow2 image.

    ``source`` is a path, a file descriptor (duplicated), a ``Storage`` or a Python object with
    ``size()`` and ``pread(length, offset)`` (and ``pwrite``, ``flush``, ``truncate`` to write).
    ``mode`` is ``"r"`` or ``"r+"``.

    ``references`` says what happens to a name found inside the image: ``"deny"`` (the default)
    refuses it with ReferenceDenied, ``"follow"`` opens it, a callable gets a
    :class:`~qcow2x.types.Reference` and returns the source to use, or None to refuse. ``backing``
    gives the backing file outright: a source (read in the format that the image names), an open
    Image, or a :class:`qcow2x.backing.GuestDisk` (also for an image that names none); ``False``
    opens the image without one, and a read that would need it raises.

    ``snapshot`` opens the disk as the internal snapshot with that id or name holds it, read-only.

    ``data_file`` gives the external data file outright, as ``backing`` does for the backing file;
    ``False`` opens an image without it, and a read that would need it raises.

    ``cache`` is one of QEMU's modes: ``writeback`` (durable at flush), ``none`` (the same past the
    host's page cache), ``writethrough`` and ``directsync`` (durable at return, the latter past the
    page cache), ``unsafe`` (flush is ignored: only to build what is synced otherwise).
    ``l2_cache_size`` bounds the mapping cache in bytes (default 32 MiB: 256 GiB at 64 KiB
    clusters whatever lies where; sixteen times as much, 4 TiB, of a disk that was filled in order).

    ``overlap_check`` says which tables of the image are guarded against writes that a damaged entry
    leads to them: ``none``, ``constant`` (header, L1, refcount and snapshot table), ``cached`` (and L2
    tables, refcount blocks, snapshots' L1 tables) or ``all`` (and snapshots' L2 tables). Such a write
    raises CorruptImage, sets the image's corrupt bit, and nothing is written after it.
    ``lazy_refcounts`` says whether refcounts may wait for the close, as the image's feature bit of that
    name asks for (None): the first allocation sets the dirty bit, and a flush then writes the mapping
    alone. Version 2 has no such bit and keeps them exact.
    ``growth`` says how an image grows. ``"ahead"``: host clusters are counted and written with zeros in
    runs of 1 to 8 MiB ahead of their use, and mapped ahead of a writer that moves on through the disk,
    so that most writes to new clusters touch no metadata; what is unused when the image is closed (or
    checked, or a snapshot taken) is given back, after a crash it is leaked or reads as zeros. While the
    image is open, clusters that are mapped ahead show as data in :meth:`Image.extents`. ``"together"``: the
    same, in space that the host's file system sets aside, while several writes are under way, so that they
    need not wait for each other; what nobody flushed is no more durable for it. ``"plain"``: each cluster
    when it is written to. ``"auto"``, the default: ahead where writes are durable at return
    (``writethrough``, ``directsync``), together where they go past the page cache (``none``), else plain.
    Encrypted images and external data files grow plain.
    ``discard_to_host=False`` keeps freed clusters allocated in the host's file system.
    ``key`` is the passphrase of an encrypted image: bytes, text (as UTF-8), a callable that gets
    the image's name and returns either, or a mapping from names to either. It serves every
    encrypted layer of the chain. Nothing of it is kept; see :mod:`qcow2x.encryption`.

    ``lock`` takes part in QEMU's image locking (see :mod:`qcow2x.locking`): ImageLocked if another
    program has the image open in a way that excludes this one.

    An image whose dirty bit is set, as its last writer did not get to close it, has its refcounts
    rebuilt when it is opened with mode ``"r+"``; mode ``"r"`` leaves it as it is.

    Raises FormatError for what is not a valid image, UnsupportedFeature for what it needs and is
    not supported, CorruptImage, ReferenceDenied,
    KeyRequired for an encrypted image without its key, OSError. Nothing stays open after a failure.
    """
    if mode not in ("r", "r+"):
        raise ValueError(f'mode must be "r" or "r+", not {mode!r}')
    check_mode(cache)
    if snapshot is not None and mode != "r":
        raise ValueError('a snapshot can only be opened with mode "r"')
    opener = _Opener(references, cache, l2_cache_size, lock, snapshot, data_file, key)
    opener.overlap_check = overlap_check
    opener.discard_to_host = discard_to_host
    opener.lazy_refcounts = lazy_refcounts
    opener.growth = growth
    return opener.open(source, mode == "r+", backing)


class _Opener:
    """One call of open(): the policy, and the layers it meets."""

    def __init__(
        self,
        references: ReferencePolicy,
        cache: str,
        l2_cache_size: int | None,
        lock: bool,
        snapshot: str | None,
        data_file: Source | bool | None,
        key: KeySource | None,
    ) -> None:
        self.references = references
        self.cache = cache
        self.l2_cache_size = l2_cache_size
        self.lock = lock
        self.snapshot = snapshot
        self.data_file = data_file
        self.key = key
        self.overlap_check = "cached"
        self.discard_to_host = True
        self.lazy_refcounts: bool | None = None
        self.growth = "auto"
        self.rebuilt: CheckResult | None = None
        self.locks: list[ImageLock] = []
        self.chain = _backing.Chain()

    def open(
        self, source: Source, writable: bool, backing: Source | _backing.GuestDisk | bool | None
    ) -> Image:
        # The layers are opened from the top down and stacked from the bottom up, in a loop: a
        # chain of a thousand must not need a thousand Python frames.
        layers: list[tuple[Storage, Header, Storage | None]] = []
        bottom: Storage | None = None
        mine: list[Storage] = []
        try:
            while True:
                top = not layers
                storage, owned = self._storage(source, writable and top)
                if owned:
                    mine.append(storage)
                self._take_lock(storage, writable and top)
                self.chain.enter(storage)
                header = _load_header(storage)
                _refuse_unsupported(header, storage.name, writable and top)
                if writable and top and header.dirty:
                    from qcow2x.ops.check import rebuild_refcounts

                    # Whoever wrote last did not get to its end.
                    self.rebuilt = rebuild_refcounts(storage, header)
                    header = _load_header(storage)
                if top and self.snapshot is not None:
                    wanted = _snapshot.find(
                        _snapshot.read_table(storage, header), self.snapshot, storage.name
                    )
                    header = _snapshot.header_at(header, wanted, storage.name)
                data = self._data_storage(storage, header, writable and top, top, mine)
                layers.append((storage, header, data))
                if top and isinstance(backing, _backing.GuestDisk):
                    bottom = backing.storage
                    break
                if header.backing_file is None:
                    break
                reference = _backing.reference_to(
                    "backing", header.backing_file, header.backing_format, storage.name
                )
                given = backing if top else None
                assert not isinstance(given, _backing.GuestDisk)
                if given is False:
                    bottom = open_storage(_backing.Withheld(reference))
                    break
                if given is None or given is True:
                    source = _backing.resolve(reference, self.references)
                else:
                    source = given
                if isinstance(source, CoreImage):
                    bottom = source
                    break
                if _backing.check_format(reference) == "raw":
                    bottom, owned = self._storage(source, False)
                    if owned:
                        mine.append(bottom)
                    self._take_lock(bottom, False)
                    self.chain.enter(bottom)
                    break
            if (
                backing not in (None, False, True)
                and not isinstance(backing, _backing.GuestDisk)
                and layers[0][1].backing_file is None
            ):
                raise ValueError(f"{layers[0][0].name}: backing= given, but it has no backing file")
            self._check_key([header for _, header, _ in layers], layers[0][0].name)
            image: Image | None = None
            while layers:
                storage, header, data = layers.pop()
                below = image if image is not None else bottom
                image = Image(
                    storage,
                    header,
                    backing=below,
                    data=data,
                    cipher=self._cipher(storage, header),
                    l2_cache_size=self.l2_cache_size,
                    writable=writable and not layers,
                    overlap_check=self.overlap_check,
                    discard_to_host=self.discard_to_host,
                    lazy_refcounts=self._is_lazy(header),
                    growth=self.growth,
                )
            assert image is not None
            image.rebuilt = self.rebuilt
            image._own(mine, self.locks, self.overlap_check == "all")
            mine, self.locks = [], []
            return image
        finally:
            for lock in self.locks:
                lock.release()
            for storage in mine:
                storage.close()

    def _is_lazy(self, header: Header) -> bool:
        return header.lazy_refcounts if self.lazy_refcounts is None else self.lazy_refcounts

    def _data_storage(
        self, storage: Storage, header: Header, writable: bool, top: bool, mine: list[Storage]
    ) -> Storage | None:
        """The external data file of a layer, opened under the same policy as a backing file."""
        given = self.data_file if top else None
        if not header.has_data_file:
            if given not in (None, False, True):
                raise ValueError(f"{storage.name}: data_file= given, but it has no data file")
            return None
        reference = _backing.reference_to("data-file", header.data_file or "", "raw", storage.name)
        if given is False:
            return open_storage(_backing.Withheld(reference))
        if given is None or given is True:
            if header.data_file is None:
                raise FormatError(
                    f"{storage.name}: needs an external data file but does not name it; "
                    "pass data_file="
                )
            given = _backing.resolve(reference, self.references)
        data, owned = self._storage(given, writable)
        if owned:
            mine.append(data)
        self._take_lock(data, writable)
        self.chain.enter(data)
        return data

    def _check_key(self, headers: list[Header], name: str) -> None:
        """A key that fits nowhere is a mistake; a callable or mapping may know of other images."""
        if not isinstance(self.key, (bytes, bytearray, memoryview, str)):
            return
        if all(header.encryption is None for header in headers):
            raise ValueError(f"{name}: a key was given, but the image is not encrypted")

    def _cipher(self, storage: Storage, header: Header) -> SectorCipher | None:
        if header.encryption is None:
            return None
        # What an image without encryption has no use for is not imported for it.
        from qcow2x.encryption import open_cipher

        return open_cipher(storage, header, self.key)

    def _take_lock(self, storage: Storage, writable: bool) -> None:
        if self.lock:
            taken = lock_image(storage, writable)
            if taken is not None:
                self.locks.append(taken)

    def _storage(self, source: Source, writable: bool) -> tuple[Storage, bool]:
        """The storage of a layer and whether it is ours to close."""
        cache = self.cache if writable else _backing.layer_cache(self.cache)
        storage = open_storage(source, writable=writable, cache=cache)
        return storage, storage is not source


def _load_header(storage: Storage) -> Header:
    return Header.load(storage.pread, lambda: _disk_bytes(storage), storage.name)


def _refuse_unsupported(header: Header, name: str, writable: bool) -> None:
    header.require_supported(name)
    if writable and header.corrupt:
        raise _marked_corrupt(name)


def _marked_corrupt(name: str) -> CorruptImage:
    exc = CorruptImage(
        f"{name}: is marked corrupt and can only be read; repair it first, with qcow2x check -r all"
    )
    exc.path = name
    exc.what = "qcow2: Image is corrupt; cannot be opened read/write"
    return exc


#: What a child of this process must leave alone.
_open_here: WeakSet[Image] = WeakSet()


def _after_fork() -> None:
    """In a child: the images are the parent's, which goes on with them."""
    for image in list(_open_here):
        image._left_to_parent()


os.register_at_fork(after_in_child=_after_fork)


class Image(CoreImage):
    """An open image. Made by :func:`qcow2x.open`; a context manager.

    Any number of threads may use one image at once. Offsets and lengths are bytes of the guest
    disk; positional calls move no cursor. The reading and writing methods are those of
    :class:`qcow2x._core.image.CoreImage`.

    After a ``fork()`` it stays the parent's: in the child it is closed, without a byte written, and
    whatever is asked of it there raises ValueError. A child opens the image anew.
    """

    #: What opening found and repaired in an image with the dirty bit; None without it.
    rebuilt: CheckResult | None = None

    _owned: tuple[Storage, ...] = ()
    _locks: tuple[ImageLock, ...] = ()
    _guard_all = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Resizing, repairing and closing exclude each other: a second close must not take the
        # file away while the first still flushes. Reentrant, for a signal handler that closes.
        self._exclusive = threading.RLock()
        self._bitmaps = _bitmap.Directory()
        _open_here.add(self)

    def _own(
        self, storages: list[Storage], locks: list[ImageLock], guard_all: bool = False
    ) -> None:
        """What close() has to close and to release."""
        if self.writable:
            self._guard_all = guard_all
            _snapshot.guard_tables(self, guard_all)
            self._clear_autoclear(bitmaps=_bitmap.begin(self))
        self._owned, self._locks = tuple(storages), tuple(locks)

    # ---- Looking ----

    def info(self) -> ImageInfo:
        """What ``qemu-img info`` tells, typed. Reads nothing that is not in memory."""
        header = self._header
        backing_file = header.backing_file
        full = None
        if backing_file is not None:
            full = _backing.reference_to("backing", backing_file, None, self.name).path
        return ImageInfo(
            filename=self.name,
            format="qcow2",
            virtual_size=self.size,
            actual_size=_host_bytes(self._file),
            cluster_size=self.cluster_size,
            compat=header.compat,
            compression_type=header.compression_type,
            lazy_refcounts=header.lazy_refcounts,
            refcount_bits=header.refcount_bits,
            corrupt=header.corrupt,
            extended_l2=header.extended_l2,
            dirty=header.dirty,
            backing_filename=backing_file,
            full_backing_filename=full if full is not None else backing_file,
            backing_format=header.backing_format,
            data_file=header.data_file,
            data_file_raw=header.data_file_raw,
            encryption=header.encryption,
            snapshot_count=header.nb_snapshots,
        )

    def extents(
        self, offset: int = 0, length: int | None = None, *, layers: int | None = None
    ) -> Iterator[Extent]:
        """The runs that the disk from ``offset`` on is made of, in order, through the whole chain.

        With ``layers`` only so many of the chain are looked at, from the top down. What they leave
        to the next one comes as runs of that depth which are neither data nor zero.

        Neighbouring runs that continue each other are one. The image may change meanwhile; each
        run was true when it was looked up. Raises ValueError for a range outside the disk,
        CorruptImage for damaged tables.
        """
        end = self.size if length is None else offset + length
        if offset < 0 or end < offset or end > self.size:
            raise ValueError(f"{self.name}: extents of a range outside the disk")
        chain = self.backing_chain
        return _merged(_runs(chain, offset, end, len(chain) if layers is None else layers))

    @property
    def backing(self) -> Storage | None:
        """The layer below: an Image, a Storage holding a raw disk, or None."""
        return self._backing

    @property
    def backing_chain(self) -> list[Storage]:
        """This image and every layer below it, from the top down."""
        chain: list[Storage] = [self]
        while isinstance(chain[-1], Image) and chain[-1]._backing is not None:
            chain.append(chain[-1]._backing)
        return chain

    @property
    def snapshots(self) -> _snapshot.Snapshots:
        """The internal snapshots: a sequence, with create, delete, apply, open and diff."""
        return _snapshot.Snapshots(self)

    @property
    def bitmaps(self) -> _bitmap.Bitmaps:
        """The persistent dirty bitmaps: a mapping by name, with add, remove, merge and more."""
        return _bitmap.Bitmaps(self)

    def stats(self) -> Stats:
        """Counters since the image was opened, and what its caches hold now. Takes no lock."""
        return Stats(*self._counters())

    def check(
        self,
        *,
        repair: str | None = None,
        dry_run: bool = False,
        journal: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> CheckResult:
        """Checks every table of the image against every other, and repairs it: see
        :func:`qcow2x.check`, which also repairs what cannot be opened for writing.

        Flushes first. Nothing else should use the image meanwhile; a repair needs mode ``"r+"``.
        Findings come back, they do not raise. Raises Cancelled if ``progress`` returned False,
        StorageError where the file cannot be read.
        """
        from qcow2x.ops.check import check_storage

        if repair is not None and not dry_run and not self.writable:
            raise PermissionError(f"{self.name}: repair needs an image opened with mode 'r+'")
        with self._exclusive:
            mends = repair is not None and not dry_run
            if mends and self._bitmaps.entries:
                with _bitmap.frozen(self):
                    _bitmap.store(self)
            if self.writable:
                self._settle_refcounts()
            try:
                return check_storage(
                    self._file,
                    self._reread_header(),
                    repair=repair,
                    dry_run=dry_run,
                    journal=journal,
                    progress=progress,
                )
            finally:
                if mends:
                    header = self._reread_header()
                    self._reload(header)
                    self._header.extensions = header.extensions
                    _snapshot.guard_tables(self, self._guard_all)
                    _bitmap.begin(self)

    def _finish_half_done(self) -> None:
        """After lack of room in the middle of a snapshot's step, which made the image refuse writes:
        does what the next opening would do, and writes go on. Raises what the file raises, and may
        be called again then. The next flush, change of snapshots or close calls it."""
        from qcow2x.ops.check import rebuild_refcounts

        with self._exclusive:
            if not self._half_done:
                # Another thread was here.
                return
            rebuild_refcounts(self._file, self._reread_header())
            header = self._reread_header()
            self._reload(header)
            self._header.extensions = header.extensions
            _snapshot.guard_tables(self, self._guard_all)
            _bitmap.guard(self)
            self._revive()

    def _reread_header(self) -> Header:
        return _load_header(self._file)

    # ---- Changing ----

    def resize(self, size: int, *, shrink: bool = False, preallocation: str = "off") -> None:
        """Makes the disk ``size`` bytes long (a multiple of 512), durably at return.

        What is new reads as zeros. Shrinking needs ``shrink=True`` and loses what lies past the new
        end. ``preallocation`` of the new part: ``off``, ``metadata`` (mapped, no host blocks),
        ``falloc`` (host blocks reserved) or ``full`` (written).
        """
        if preallocation not in PREALLOCATIONS:
            raise ValueError(f"preallocation must be one of {', '.join(PREALLOCATIONS)}")
        with self._exclusive:
            self._resize_alone(size, shrink, preallocation)

    def _resize_alone(self, size: int, shrink: bool, preallocation: str) -> None:
        old = self.size
        if size % 512:
            raise ValueError(f"{self.name}: The new size must be a multiple of 512")
        if size < old:
            if not shrink:
                raise ValueError(
                    f"{self.name}: shrinking from {old} to {size} bytes loses data; "
                    "pass shrink=True if that is meant"
                )
            if preallocation != "off":
                raise ValueError(f"{self.name}: Preallocation can't be used for shrinking an image")
        elif preallocation != "off" and self._cipher is not None and self._header.version < 3:
            # Before the disk grows: the core refuses only the first cluster.
            raise UnsupportedFeature(
                f"{self.name}: a version 2 image has no mark for zeros, so that an encrypted one "
                "cannot be preallocated",
                features=("preallocation of an encrypted version 2 image",),
            )
        if self._header.nb_snapshots and self._header.version < 3:
            # Its snapshot table has no field for the size that the disk had.
            raise UnsupportedFeature(
                f"{self.name}: Can't resize a v2 image which has snapshots",
                features=("resize of version 2 with snapshots",),
            )
        with _bitmap.resizing(self, size):
            if self._header.data_file_raw and size > old:
                self._data.truncate(size)
            self._resize(size)
        if self._header.data_file_raw and size < old:
            self._data.truncate(size)
        if preallocation != "off" and size > old:
            self._preallocate(preallocation, old)

    def _preallocate(self, mode: str, offset: int = 0) -> None:
        """Gives every cluster from ``offset`` on a host cluster; see resize()."""
        end = self.size
        # A cluster that the old disk ended in holds old bytes: it stays as it is, in all its length.
        # With a backing file that may show through it, one that is not there yet stays away.
        first = min(end, -(-offset // self.cluster_size) * self.cluster_size)
        if offset < first:
            start = offset // self.cluster_size * self.cluster_size
            if self._backing is None and self._holds_nothing(start, first):
                self._allocate(start, first - start)
            if not self._header.has_data_file:
                self._complete_cluster(mode, offset, first)
        offset = first
        self._allocate(offset, end - offset)
        if mode == "metadata":
            self.flush()
            return
        if self._header.has_data_file:
            if mode in ("falloc", "full"):
                self._data.reserve(offset, end - offset)
            self.flush()
            return
        cluster = self.cluster_size
        for extent in self.extents(offset, end - offset):
            if extent.host_offset is None:
                continue
            # The last cluster is a whole one in the file, also where the disk ends inside it.
            nbytes = -(-extent.length // cluster) * cluster
            if mode == "falloc" and nbytes > _WRITTEN_RATHER:
                self._file.reserve(extent.host_offset, nbytes)
            else:
                self._write_blank(extent.host_offset, nbytes)
        self.flush()

    def _write_blank(self, host: int, nbytes: int) -> None:
        """Zeros for a part of the file that is new: before anything was written to it, it is all
        zeros, so that this changes no byte."""
        blank = bytes(min(nbytes, 1 << 20))
        for at in range(0, nbytes, len(blank)):
            self._file.pwrite(blank[: nbytes - at], host + at)

    # ---- The state of a machine ----

    def vmstate_pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes of the state of a machine that is kept with the image, behind the disk,
        from ``offset`` of that state on. What was never written is zeros. Errors as :meth:`pread`,
        and UnsupportedFeature for an image with an external data file."""
        data = bytearray(length)
        self.vmstate_preadinto(data, offset)
        return bytes(data)

    def vmstate_pwrite(self, data: Buffer, offset: int) -> int:
        """Writes all of ``data`` at ``offset`` of a machine's state; returns its length.

        The state may be as long as an L1 table of 32 MiB reaches behind the disk (2 PiB at 64 KiB
        clusters). It becomes part of the next internal snapshot, and ends when the disk is resized
        to where it lies. One thread at a time; others wait. Errors as :meth:`pwrite`; OSError
        (EFBIG) past the end.
        """
        with memoryview(data) as view, self._exclusive:
            end = self.vmstate_offset + offset + view.nbytes
            if self._l1_entries_for(end) * 8 > _snapshot.MAX_L1_BYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), self.name)
            self._vmstate_write(view, offset)
            return view.nbytes

    def _holds_nothing(self, start: int, end: int) -> bool:
        while start < end:
            for at, nbytes, kind, _ in self._plan(start, end - start):
                if kind not in (_UNALLOCATED, _ZERO):
                    return False
                start = at + nbytes
        return True

    def _complete_cluster(self, mode: str, offset: int, end: int) -> None:
        """Has the file reach to the end of the cluster that ``offset`` lies in: writers of less than
        a whole one leave the rest behind the end of the file."""
        self.flush()
        for at, _, kind, host in self._plan(offset, end - offset):
            if kind != _DATA:
                continue
            rest = -at % self.cluster_size
            if mode != "metadata":
                # In one piece on the host, where the cluster is new.
                self._file.reserve(host - at % self.cluster_size, self.cluster_size)
                if self._header.encryption is None:
                    self._write_blank(host, rest)
            elif _disk_bytes(self._file) < host + rest:
                self._file.truncate(host + rest)

    # ---- As a file ----

    def as_file(self) -> io.RawIOBase:
        """The guest disk as a raw binary file with a cursor of its own; closing it leaves the image
        open. Wrap it in io.BufferedReader for many small reads."""
        return DiskFile(self)

    # ---- Closing ----

    def close(self) -> None:
        """Flushes, waits for requests under way and closes what open() opened. May be called more
        than once. Raises what the flush raises; the image is closed even so."""
        with self._exclusive:
            try:
                self._store_and_shut()
            finally:
                locks, self._locks = self._locks, ()
                owned, self._owned = self._owned, ()
                for lock in locks:
                    lock.release()
                for storage in owned:
                    storage.close()

    def _store_and_shut(self) -> None:
        """No write gets in between the last look at what was written and the end."""
        if self._half_done and not self.closed:
            with contextlib.suppress(OSError):
                self._finish_half_done()
        frozen = False
        try:
            if self.writable and not self.closed and self._bitmaps.entries:
                self._freeze()
                frozen = True
                _bitmap.end(self)
        finally:
            try:
                self._shut()
            finally:
                if frozen:
                    self._thaw()

    def _left_to_parent(self) -> None:
        self._leave_to_parent()
        # A thread that is not here may hold it.
        self._exclusive = threading.RLock()
        # Locks of a file are those of parent and child together: not to be given back here. But
        # what this process keeps open would hold them after the parent is gone.
        self._locks = ()
        owned, self._owned = self._owned, ()
        for storage in owned:
            if isinstance(storage, FileStorage):
                storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Data first, as with Python's own files; but rely on close(), not on this.
        if self._owned and self.writable and not self.closed:
            warnings.warn(f"unclosed image {self.name!r}", ResourceWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "r+" if self.writable else "r"
        return f"<qcow2x.Image {self.name!r} {state} {self.size} bytes>"


def _host_bytes(storage: Storage) -> int | None:
    if isinstance(storage, FileStorage):
        return os.fstat(storage.fileno()).st_blocks * 512
    return None


def _merged(runs: Iterator[Extent]) -> Iterator[Extent]:
    last: Extent | None = None
    for run in runs:
        if last is not None and _continues(last, run):
            last = last._replace(length=last.length + run.length)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def _continues(last: Extent, run: Extent) -> bool:
    if (last.host_offset is None) != (run.host_offset is None):
        return False
    if last.host_offset is not None and last.host_offset + last.length != run.host_offset:
        return False
    return last[2:6] == run[2:6] and last.filename == run.filename


def _runs(layers: list[Storage], offset: int, end: int, depth_end: int) -> Iterator[Extent]:
    """The runs of a chain, layers from the top down. What a layer leaves open is asked of the next
    one from a stack, not by recursion: chains are deeper than Python's."""
    todo: list[Extent | tuple[int, int, int]] = [(0, offset, end)]
    while todo:
        item = todo.pop()
        if isinstance(item, Extent):
            yield item
            continue
        depth, start, stop = item
        if depth == depth_end:
            yield Extent(start, stop - start, False, False, False, depth, None, None)
            continue
        layer = layers[depth]
        if not isinstance(layer, Image):
            yield from _raw_runs(layer, start, stop, depth)
            continue
        planned: list[Extent | tuple[int, int, int]] = []
        for at, nbytes, kind, host in layer._plan(start, stop - start):
            planned += _layer_run(layers, depth, at, nbytes, kind, host)
            start = at + nbytes
        if start < stop:
            planned.append((depth, start, stop))
        todo += reversed(planned)


def _layer_run(
    layers: list[Storage], depth: int, at: int, nbytes: int, kind: int, host: int
) -> list[Extent | tuple[int, int, int]]:
    if kind != _UNALLOCATED:
        # Data may lie at offset 0 of an external data file; elsewhere 0 is no place.
        has_place = kind == _DATA or (kind == _ZERO and host)
        host_offset = host if has_place else None
        zero = kind == _ZERO
        layer = layers[depth]
        name = layer._data.name if isinstance(layer, Image) else layer.name
        return [Extent(at, nbytes, not zero, zero, kind == _COMPRESSED, depth, host_offset, name)]
    below = depth + 1
    if below == len(layers):
        return [Extent(at, nbytes, False, True, False, depth, None, None)]
    # The backing layer may end before the disk above it does.
    stop = min(at + nbytes, _disk_bytes(layers[below]))
    runs: list[Extent | tuple[int, int, int]] = []
    if at < stop:
        runs.append((below, at, stop))
    if max(at, stop) < at + nbytes:
        start = max(at, stop)
        # It is the layer above that reads as zeros past the end of a short one.
        runs.append(Extent(start, at + nbytes - start, False, True, False, depth, None, None))
    return runs


def _disk_bytes(layer: Storage) -> int:
    return layer.size if isinstance(layer, CoreImage) else layer.size()


def _raw_runs(below: Storage, offset: int, end: int, depth: int) -> Iterator[Extent]:
    while offset < end:
        nbytes, kind = below.extent(offset, end - offset)
        data = kind == "data"
        yield Extent(offset, nbytes, data, not data, False, depth, offset, below.name)
        offset += nbytes


class DiskFile(io.RawIOBase):
    """The guest disk of an image with a cursor. Not for several threads at once."""

    def __init__(self, image: Image) -> None:
        super().__init__()
        self._image = image
        self._at = 0

    @property
    def name(self) -> str:
        return self._image.name

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return self._image.writable

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._check_open()
        n = self._image.preadinto(buffer, self._at)
        self._at += n
        return n

    def readall(self) -> bytes:
        self._check_open()
        data = self._image.pread(max(0, self._image.size - self._at), self._at)
        self._at += len(data)
        return data

    def write(self, data: Any) -> int:
        self._check_open()
        if not self.writable():
            raise io.UnsupportedOperation("the image is open read-only")
        with memoryview(data).cast("B") as view:
            # A disk has an end: what fits is written, as on a block device.
            room = max(0, self._image.size - self._at)
            if view.nbytes and not room:
                raise OSError(28, f"{self.name}: the end of the disk")
            n = self._image.pwrite(view[:room], self._at)
        self._at += n
        return n

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._check_open()
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._image.size}
        if whence not in base:
            raise ValueError(f"whence {whence} is not supported")
        if base[whence] + offset < 0:
            raise ValueError("the position would be negative")
        self._at = base[whence] + offset
        return self._at

    def tell(self) -> int:
        return self.seek(0, io.SEEK_CUR)

    def flush(self) -> None:
        if not self.closed and self.writable():
            self._image.flush()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
