"""Making an image: arguments checked first, then the empty image, then its preallocation."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import index
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeGuard

from qcow2x._core.header import Header
from qcow2x._core.layout import (
    forget_subclusters,
    largest_disk,
    write_empty_image,
    write_header,
)
from qcow2x._core.storage import FileStorage
from qcow2x.locking import lock_image

if TYPE_CHECKING:
    from qcow2x.encryption import Encryption, KeySource
    from qcow2x.storage import Source, Storage

__all__ = ["create"]

StrOrBytesPath: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"

#: Disks are whole sectors: a reader that counts in sectors would lose the bytes of half a one.
SECTOR = 512
#: Extended L2 entries have 32 subclusters of at least one sector.
MIN_EXTENDED_CLUSTER = 16384
COMPAT_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
COMPRESSION_TYPES = {"zlib": 0, "zstd": 1}
PREALLOCATIONS = ("off", "metadata", "falloc", "full")
#: Format names that QEMU knows for a backing file. Only raw and qcow2 can be read here.
BACKING_FORMATS = frozenset(
    ("bochs", "cloop", "dmg", "luks", "parallels", "qcow")
    + ("qcow2", "qed", "raw", "vdi", "vhdx", "vmdk", "vpc")
)


class DiskTooLarge(ValueError):
    """No image of this cluster size can hold the disk."""


def create(
    path: Source,
    size: int | None = None,
    *,
    cluster_size: int = 65536,
    compat: str = "1.1",
    refcount_bits: int = 16,
    backing_file: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    preallocation: str = "off",
    lazy_refcounts: bool = False,
    extended_l2: bool = False,
    compression_type: str = "zlib",
    data_file: str | os.PathLike[str] | None = None,
    data_file_raw: bool = False,
    encryption: Encryption | None = None,
    nocow: bool = False,
    extent_size_hint: int = 0,
) -> None:
    """Makes a new, empty qcow2 image, durable when the call returns.

    ``path`` is a path, a file descriptor, a ``Storage`` or a Python object with ``pread``,
    ``pwrite``, ``truncate``, ``flush`` and ``size``. An existing file is replaced, but only after
    every argument was found good; a new file that could not be finished is removed again.

    ``size`` is the disk's size in bytes, rounded up to 512. Without it the disk gets the size of
    the backing file, which is opened for this, read-only and by the given format alone; a
    relative ``backing_file`` counts from the folder of ``path``. With ``size`` given the backing
    file is not touched.

    ==================  =====================================================================
    cluster_size        512 to 2 MiB, a power of two
    compat              ``"1.1"`` (version 3) or ``"0.10"`` (version 2; 16-bit refcounts, zlib,
                        no lazy refcounts, no extended L2 entries)
    refcount_bits       1, 2, 4, 8, 16, 32 or 64
    backing_format      required with ``backing_file``: it is never guessed
    preallocation       ``off``, ``metadata``, ``falloc`` or ``full``; with a backing file only
                        together with ``extended_l2``
    extended_l2         clusters of at least 16 KiB
    compression_type    ``zlib`` or ``zstd``
    encryption          an :class:`qcow2x.Encryption`; takes its ``iter_time_ms`` at least
    nocow               asks btrfs not to copy on write; elsewhere it does nothing
    extent_size_hint    asks XFS for extents of so many bytes; elsewhere it does nothing
    ==================  =====================================================================

    Raises ValueError for an argument out of its range, UnsupportedFeature for what cannot be
    created here, ImageLocked if another program has the existing image open, FormatError if the backing file is not what ``backing_format`` says, and
    OSError (NoSpace, StorageError) from the file.
    """
    version = _one_of("version", compat, COMPAT_VERSIONS)
    if preallocation not in PREALLOCATIONS:
        raise ValueError(f"Parameter 'preallocation' does not accept value '{preallocation}'")
    compression = _one_of("compression-type", compression_type, COMPRESSION_TYPES)
    if extended_l2 and version < 3:
        raise _needs_version_3("Extended L2 entries are only supported with")
    cluster_bits = _cluster_bits(cluster_size, extended_l2)
    if backing_file is not None and preallocation != "off" and not extended_l2:
        raise ValueError(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
        )
    backing_name = _backing_name(backing_file, backing_format)
    if lazy_refcounts and version < 3:
        raise _needs_version_3("Lazy refcounts only supported with")
    refcount_order = _refcount_order(refcount_bits, version)
    data_name = _data_name(data_file, data_file_raw, backing_file, version)
    if compression and version < 3:
        raise _needs_version_3("Non-zlib compression type is only supported with")
    header = Header.new(
        _disk_size(size, path, backing_name, backing_format, cluster_bits, extended_l2),
        cluster_bits=cluster_bits,
        version=version,
        refcount_order=refcount_order,
        extended_l2=extended_l2,
        lazy_refcounts=lazy_refcounts,
        compression_type=compression,
        backing_file=backing_name,
        backing_format=backing_format,
    )
    luks_area = b""
    if encryption is not None:
        luks_area = _encrypt(header, encryption, path, preallocation, data_file_raw)
    if data_name is not None:
        header.use_data_file(data_name, data_file_raw)
        if data_file_raw and preallocation == "off":
            # Only with every cluster mapped to its place does the data file read as the disk.
            preallocation = "metadata"
    header.encode()  # raises ValueError if the names do not fit in a cluster
    _refuse_own_backing(path, backing_name)
    hints = Hints(nocow, extent_size_hint)
    with (
        open_target(path, hints) as storage,
        _data_target(path, data_name, header.size, hints),
    ):
        if preallocation == "off":
            write_empty_image(storage, header, luks_area)
        else:
            key = None if encryption is None else encryption.key
            _write_preallocated(storage, header, preallocation, luks_area, key)


def _write_preallocated(
    storage: Storage, header: Header, mode: str, luks_area: bytes, key: KeySource | None
) -> None:
    from qcow2x.image import open as open_image

    # The backing file's name goes in last: nothing of it is needed, so nothing of it is opened.
    backing_file, backing_format = header.backing_file, header.backing_format
    header.backing_file = header.backing_format = None
    write_empty_image(storage, header, luks_area)
    with (
        _unsynced(storage) as target,
        open_image(target, "r+", lock=False, references="follow", key=key) as image,
    ):
        image._preallocate(mode)
    if backing_file is not None:
        header = Header.load(storage.pread, storage.size(), storage.name)
        forget_subclusters(storage, header)
        header.backing_file, header.backing_format = backing_file, backing_format
        write_header(storage, header)
    storage.flush()


# --- arguments -----------------------------------------------------------------------------


def _encrypt(
    header: Header, encryption: Encryption, path: Source, preallocation: str, data_file_raw: bool
) -> bytes:
    """Says in the header how it is encrypted; the LUKS header and key slots, if there are any."""
    from qcow2x.encryption import Encryption

    if not isinstance(encryption, Encryption):
        raise TypeError(f"encryption must be a qcow2x.Encryption, not {type(encryption).__name__}")
    if data_file_raw:
        raise ValueError("a raw data file reads as the disk by itself: it cannot be encrypted")
    if preallocation != "off":
        encryption.refuse_preallocation(header.version)
    luks_area = encryption.new_area(name_of(path))
    # Where that will lie is known when the tables are laid out.
    header.set_encryption(encryption.format, header.cluster_size, len(luks_area))
    return luks_area


def _data_name(
    data_file: str | os.PathLike[str] | None,
    raw: bool,
    backing_file: str | os.PathLike[str] | None,
    version: int,
) -> str | None:
    if data_file is None:
        if raw:
            raise ValueError("data-file-raw requires data-file")
        return None
    name = os.fsdecode(data_file)
    if not name or "\0" in name or not _is_plain_path(name):
        raise ValueError("data_file must be a plain path")
    if raw and backing_file is not None:
        raise ValueError("Backing file and data-file-raw cannot be used at the same time")
    if version < 3:
        raise _needs_version_3("External data files are only supported with")
    return name


@contextmanager
def _data_target(path: Source, name: str | None, size: int, hints: Hints) -> Iterator[None]:
    """The empty data file, removed again if the body fails. As QEMU has it, a relative name counts
    from the working folder, not from that of the image."""
    if name is None:
        yield
        return
    if _is_path(path) and os.path.exists(path) and os.path.exists(name):
        if os.path.samefile(path, name):
            raise ValueError(f"{name!r} cannot be its own data file")
    with open_target(name, hints) as storage:
        storage.truncate(0)
        storage.truncate(size)
        storage.flush()
        yield


def _one_of(argument: str, value: str, choices: dict[str, int]) -> int:
    try:
        return choices[value]
    except (KeyError, TypeError):
        raise ValueError(f"Parameter '{argument}' does not accept value '{value}'") from None


def check_layout(cluster_size: int, compat: str, refcount_bits: int, extended_l2: bool) -> None:
    """What decides how large the tables are. Raises ValueError for a value out of its range, or
    values that do not go together."""
    version = _one_of("version", compat, COMPAT_VERSIONS)
    if extended_l2 and version < 3:
        raise _needs_version_3("Extended L2 entries are only supported with")
    _cluster_bits(cluster_size, extended_l2)
    _refcount_order(refcount_bits, version)


def _needs_version_3(what: str, kind: str = "and") -> ValueError:
    return ValueError(f"{what} compatibility level 1.1 {kind} above (use version=v3 or greater)")


def _cluster_bits(cluster_size: int, extended_l2: bool) -> int:
    value = index(cluster_size)
    if not 512 <= value <= 2 << 20 or value & (value - 1):
        raise ValueError("Cluster size must be a power of two between 512 and 2048k")
    if extended_l2 and value < MIN_EXTENDED_CLUSTER:
        raise ValueError(
            "Extended L2 entries are only supported with cluster sizes of at least "
            f"{MIN_EXTENDED_CLUSTER} bytes"
        )
    return value.bit_length() - 1


def _refcount_order(refcount_bits: int, version: int) -> int:
    value = index(refcount_bits)
    if not 1 <= value <= 64 or value & (value - 1):
        raise ValueError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and value != 16:
        raise _needs_version_3("Different refcount widths than 16 bits require", "or")
    return value.bit_length() - 1


def _backing_name(
    backing_file: str | os.PathLike[str] | None, backing_format: str | None
) -> str | None:
    if backing_file is None:
        if backing_format is not None:
            raise ValueError("Backing format cannot be used without backing file")
        return None
    name = os.fsdecode(backing_file)
    if not name or "\0" in name:
        raise ValueError("backing_file must be a name without NUL bytes")
    if backing_format is None:
        raise ValueError(
            "backing_format is required with backing_file, for example 'qcow2' or 'raw': "
            "guessing it would let a guest that writes a raw disk choose the format"
        )
    if backing_format not in BACKING_FORMATS:
        raise ValueError(f"Parameter 'backing-fmt' does not accept value '{backing_format}'")
    return name


def _disk_size(
    size: int | None,
    path: Source,
    backing_name: str | None,
    backing_format: str | None,
    cluster_bits: int,
    extended_l2: bool,
) -> int:
    if size is not None:
        wanted = index(size)
        if wanted < 0:
            raise ValueError(f"size must not be negative, but is {wanted}")
    elif backing_name is None:
        raise ValueError("size is required without a backing_file")
    else:
        wanted = _backing_size(path, backing_name, backing_format)
    wanted = -(-wanted // SECTOR) * SECTOR
    largest = largest_disk(cluster_bits, extended_l2)
    if wanted > largest:
        raise DiskTooLarge(
            f"a disk of {wanted} bytes is too large for clusters of {1 << cluster_bits} bytes, "
            f"which allow {largest}; choose a larger cluster_size"
        )
    return wanted


# --- the backing file ----------------------------------------------------------------------


def name_of(path: Source) -> str:
    """What a callable or a mapping of keys is asked with: the name that open() will give it."""
    return os.fsdecode(path) if _is_path(path) else str(getattr(path, "name", path))


def _is_path(path: Source) -> TypeGuard[StrOrBytesPath]:
    return isinstance(path, (str, bytes, os.PathLike))


def _beside(path: Source, name: str) -> str:
    """A backing file's path as every reader resolves it: from the folder of the image."""
    return os.path.join(os.path.dirname(os.fsdecode(path)) if _is_path(path) else "", name)


def _is_plain_path(name: str) -> bool:
    # QEMU reads "nbd:..." or "json:..." as a protocol unless a slash comes before the colon.
    return ":" not in name.split("/", 1)[0]


def _backing_size(path: Source, name: str, backing_format: str | None) -> int:
    if backing_format not in ("raw", "qcow2") or not _is_plain_path(name):
        raise ValueError(
            f"size is required: that of the {backing_format} backing file {name!r} cannot be "
            "read here"
        )
    full_name = _beside(path, name)
    fd = os.open(full_name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        file_size = os.lseek(fd, 0, os.SEEK_END)
        if backing_format == "raw":
            return file_size
        header = Header.load(
            lambda length, offset: os.pread(fd, length, offset), file_size, full_name
        )
        header.require_supported(full_name)
        return header.size
    finally:
        os.close(fd)


def _refuse_own_backing(path: Source, name: str | None) -> None:
    if name is None or not _is_path(path) or not _is_plain_path(name):
        return
    try:
        same = os.path.samefile(path, _beside(path, name))
    except OSError:
        return  # one of the two does not exist, so they are not the same
    if same:
        raise ValueError(f"{os.fspath(path)!r} cannot be its own backing file")


# --- the target ----------------------------------------------------------------------------


class Hints(NamedTuple):
    """What a file can be told about its place on the disk while it is empty. No file system has to
    know, so nothing of it fails."""

    nocow: bool = False
    extent_size: int = 0

    def give(self, storage: Storage) -> None:
        if not isinstance(storage, FileStorage) or storage.is_device or not any(self):
            return
        storage.truncate(0)
        with suppress(OSError):
            if self.nocow:
                flags = bytearray(8)
                fcntl.ioctl(storage.fileno(), _FS_IOC_GETFLAGS, flags)
                value = struct.unpack("@l", flags)[0] | _FS_NOCOW_FL
                fcntl.ioctl(storage.fileno(), _FS_IOC_SETFLAGS, struct.pack("@l", value))
        with suppress(OSError):
            if self.extent_size:
                fields = bytearray(_FSXATTR.size)
                fcntl.ioctl(storage.fileno(), _FS_IOC_FSGETXATTR, fields)
                flags, _, *others = _FSXATTR.unpack(fields)
                changed = _FSXATTR.pack(flags | _FS_XFLAG_EXTSIZE, self.extent_size, *others)
                fcntl.ioctl(storage.fileno(), _FS_IOC_FSSETXATTR, changed)


# From the kernel's headers linux/fs.h; struct fsxattr is flags, extent size, and what stays.
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
_FS_NOCOW_FL, _FS_XFLAG_EXTSIZE = 0x00800000, 0x00000800
_FSXATTR = struct.Struct("@III16s")


@contextmanager
def open_target(path: Source, hints: Hints) -> Iterator[Storage]:
    """The storage to write to; a file that this made is removed if the body fails."""
    if not _is_path(path):
        from qcow2x.storage import open_storage

        with _locked(open_storage(path, writable=True)) as storage:
            yield storage
        return
    try:
        storage, is_new = FileStorage(path, writable=True, exclusive=True), True
    except FileExistsError:
        storage, is_new = FileStorage(path, writable=True), False
    try:
        with storage, _locked(storage):
            hints.give(storage)
            yield storage
        if is_new:
            _sync_folder(path)
    except BaseException:
        if is_new:
            with suppress(FileNotFoundError):
                os.unlink(path)
        raise


@contextmanager
def _locked(storage: Storage) -> Iterator[Storage]:
    """Nobody may have the image open that is about to be replaced."""
    lock = lock_image(storage, writable=True)
    try:
        yield storage
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def _unsynced(storage: Storage) -> Iterator[Storage]:
    """The same file without a sync at each flush: it is synced once, when all is written."""
    if isinstance(storage, FileStorage):
        with FileStorage(storage.fileno(), writable=True, cache="unsafe") as fast:
            fast.name = storage.name
            yield fast
    else:
        yield storage


def _sync_folder(path: StrOrBytesPath) -> None:
    """Makes the new file's name durable: syncing the file alone does not promise that."""
    try:
        folder = os.open(os.path.dirname(os.path.abspath(os.fsdecode(path))), os.O_RDONLY)
    except PermissionError:
        return  # a folder that may be written but not listed
    try:
        os.fsync(folder)
    except OSError as exc:
        # Some file systems do not sync folders, and say so by EINVAL.
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)
