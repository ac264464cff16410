"""Copy a disk into a new image of any supported format: ``qemu-img convert`` as a function."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcow2x.errors import CorruptImage, Qcow2Error
from qcow2x.ops.copyjob import COMPRESSION_TYPES, CopyJob, Damage, locate
from qcow2x.ops.disk import SECTOR, ConcatDisk, RawDisk, image_of, is_disk, names_under, open_disk
from qcow2x.ops.pipeline import usable_cpus
from qcow2x.ops.rate import RateLimit
from qcow2x.ops.target import NewFile, is_device, is_path
from qcow2x.types import Progress

if TYPE_CHECKING:
    from qcow2x.encryption import Encryption

__all__ = ["BrokenBitmap", "ConvertResult", "Damage", "convert"]

FORMATS = ("qcow2", "raw", "luks")
#: What copying the bitmaps may do about those that missed writes.
BITMAPS = ("none", "all", "usable")


class BrokenBitmap(CorruptImage):
    """A persistent bitmap that was to be copied missed writes; ``bitmap`` is its name."""

    def __init__(self, bitmap: str, path: str) -> None:
        super().__init__(f"{path}: bitmap {bitmap!r} missed writes and cannot be copied")
        self.bitmap = bitmap
        self.path = path


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a conversion did; all in bytes."""

    #: Virtual size of the target.
    size: int
    #: Guest bytes written as data, before compression.
    data_bytes: int
    #: Bytes those take as compressed clusters, or None when nothing was compressed.
    compressed_bytes: int | None
    #: Guest bytes that read as zeros and were not stored.
    zero_bytes: int
    #: What the host gives to the target now.
    actual_size: int
    #: Guest bytes that could not be read and are zeros in the target (only with ``salvage``).
    lost_bytes: int = 0
    #: Names of the persistent bitmaps that were copied, and of those that were left out.
    bitmaps: tuple[str, ...] = ()
    skipped_bitmaps: tuple[str, ...] = ()


def convert(
    src: Any,
    dst: Any,
    *,
    src_format: str | None = None,
    dst_format: str = "qcow2",
    compress: bool = False,
    compression_type: str = "zlib",
    level: int | None = None,
    threads: int | None = None,
    cluster_size: int = 65536,
    compat: str = "1.1",
    refcount_bits: int = 16,
    lazy_refcounts: bool = False,
    extended_l2: bool = False,
    preallocation: str = "off",
    backing_file: str | None = None,
    backing_format: str | None = None,
    data_file: str | os.PathLike[str] | None = None,
    data_file_raw: bool = False,
    encryption: Encryption | None = None,
    nocow: bool = False,
    extent_size_hint: int = 0,
    size: int | None = None,
    sparse_size: int = 4096,
    target_exists: bool = False,
    target_is_zero: bool = False,
    bitmaps: str = "none",
    salvage: bool = False,
    on_damage: Callable[[Damage], object] | None = None,
    copy_offload: bool = False,
    rate_limit: int | None = None,
    cache: str = "writeback",
    src_cache: str = "writeback",
    references: Any = "deny",
    snapshot: str | None = None,
    key: Any = None,
    lock: bool = True,
    progress: Progress | None = None,
) -> ConvertResult:
    """Copy the disk *src* to *dst*.

    *src* is a path, an open :class:`qcow2x.Image`, a storage object, or a list of these that are
    put one after another; *src_format* is ``"qcow2"``, ``"raw"``, ``"luks"`` or None to look. *dst* is a path,
    descriptor or storage object, or with *target_exists* also an open image; then only the disk's
    content is replaced, and options that describe a new image do not count.

    A new file appears whole and durable, or not at all: it is written under a temporary
    name beside the target and renamed (a *data_file* is written in its place). The bytes of the
    target do not depend on *threads* (default: one per CPU, at most 16), but for the keys of an
    encrypted one. Memory stays below 64 MiB + 4 MiB a thread.

    Runs of at least *sparse_size* zero bytes (0: look for none and allocate everything) are not
    stored. With *backing_file* only what the top layer of *src* holds is copied, as the backing
    file already shows the rest. *level* is 1..9 for zlib and 1..19 for zstd. *encryption* makes the
    target an encrypted image, as for :func:`qcow2x.create`; *key* opens an encrypted source.
    *references* is the policy for files that the source names, *lock* says whether to heed other
    programs' locks (see :func:`qcow2x.open`). Returning False from *progress* cancels.

    ==============  ===========================================================================
    bitmaps         ``"all"`` copies the persistent bitmaps of the source as well and raises
                    BrokenBitmap if one missed writes; ``"usable"`` leaves those out
    salvage         sectors that cannot be read become zeros; *on_damage* is called with a
                    :class:`Damage` for each, in the order of the disk, from any thread
    copy_offload    lets the kernel copy from file to file where it can; no zeros are looked
                    for then
    rate_limit      bytes of data written per second, at most
    ==============  ===========================================================================

    Raises Cancelled, ImageLocked, ValueError for options that do not go together, and what opening,
    reading and writing raise. Such an exception has the attributes ``doing`` (``"creating"``,
    ``"reading"``, ``"writing"`` or ``"reading block status"``) and ``guest_offset``, if it is known
    what was being done for which byte of the disk.
    """
    _check_options(dst_format, compress, compression_type, preallocation, sparse_size, threads)
    if backing_file is not None and not backing_format and not target_exists:
        raise ValueError("Use of backing file requires explicit backing format")
    if compress and encryption is not None:
        raise ValueError("Compression and encryption not supported at the same time")
    if (dst_format == "luks" and not target_exists) != (
        encryption is not None and dst_format != "qcow2"
    ):
        raise ValueError("encryption= goes with a qcow2 target, and is needed for a luks one")
    if bitmaps not in BITMAPS:
        raise ValueError(f"bitmaps must be one of {', '.join(BITMAPS)}")
    if copy_offload and (compress or salvage):
        raise ValueError("copy_offload goes neither with compress nor with salvage")
    rate = None if rate_limit is None else RateLimit(rate_limit)
    options = {
        "cluster_size": cluster_size,
        "compat": compat,
        "refcount_bits": refcount_bits,
        "backing_file": backing_file,
        "backing_format": backing_format,
        "preallocation": preallocation,
        "lazy_refcounts": lazy_refcounts,
        "extended_l2": extended_l2,
        "compression_type": compression_type,
        "data_file": data_file,
        "data_file_raw": data_file_raw,
        "encryption": encryption,
        "nocow": nocow,
        "extent_size_hint": extent_size_hint,
    }
    with ExitStack() as stack:
        source = _open_source(
            stack, src, src_format, cache=src_cache, references=references,
            snapshot=snapshot, key=key, lock=lock,
        )  # fmt: skip
        bitmap_source = _bitmap_source(source, bitmaps)
        granule = 1 if dst_format == "raw" else SECTOR
        wanted = -(-source.size // granule) * granule if size is None else size

        new_file = None
        # Whether all of the target reads as zeros, apart from what a backing file shows.
        is_fresh = not target_exists
        if target_exists:
            target = _open_existing(stack, dst, dst_format, cache, references, key, lock)
            wanted = target.size
        elif is_device(dst) and dst_format == "raw":
            target = stack.enter_context(RawDisk(dst, "r+", cache, lock=lock))
            wanted = target.size
            is_fresh = False
        elif is_device(dst) or not is_path(dst):
            # A device, descriptor or object has no other name to be written under.
            with _creating():
                target = _create(stack, dst, dst_format, wanted, cache, references, options)
        else:
            _refuse_own_source(source, dst)
            with _creating():
                new_file = stack.enter_context(NewFile(dst, lock=lock))
                # Nobody sees the file before it is whole and synced: the order of an image's
                # writes needs no barriers of its own.
                inner = "unsafe" if cache == "writeback" and dst_format == "qcow2" else cache
                target = _create(
                    stack, new_file.path, dst_format, wanted, inner, references, options
                )

        _check_bitmap_target(bitmap_source, target)
        if wanted < source.size:
            raise ValueError("output file is smaller than input file")

        job = CopyJob(
            source=source,
            target=target,
            size=min(wanted, -(-source.size // SECTOR) * SECTOR),
            zero_from=0 if target_is_zero else _zeros_from(target, wanted, is_fresh),
            compress=compress,
            level=level or 0,
            sparse_size=sparse_size,
            keep_lower=backing_file is not None,
            offload=copy_offload,
            rate=rate,
            salvage=salvage,
            on_damage=on_damage,
            progress=progress,
        )
        job.run(threads or min(usable_cpus(), 16))
        copied, skipped = _copy_bitmaps(bitmap_source, target, bitmaps)
        target.flush()
        # Of a growing image, closing trims what was reserved ahead: it has to come before the sync.
        if target is not dst:
            target.close()
        if new_file is not None:
            new_file.commit(sync=cache != "unsafe")
        return ConvertResult(
            size=wanted,
            data_bytes=job.data_bytes,
            compressed_bytes=job.compressed_bytes if compress else None,
            zero_bytes=job.zero_bytes,
            actual_size=_host_bytes(dst),
            lost_bytes=job.lost_bytes,
            bitmaps=copied,
            skipped_bitmaps=skipped,
        )


def _check_options(
    dst_format: str,
    compress: bool,
    compression_type: str,
    preallocation: str,
    sparse_size: int,
    threads: int | None,
) -> None:
    if dst_format not in FORMATS:
        raise ValueError(f"Unknown file format '{dst_format}'")
    if compress and dst_format != "qcow2":
        raise ValueError("Compression not supported for this file format")
    if compress and preallocation != "off":
        raise ValueError("Compression and preallocation not supported at the same time")
    if compression_type not in COMPRESSION_TYPES:
        raise ValueError(f"Parameter 'compression-type' does not accept value '{compression_type}'")
    if sparse_size % SECTOR or not 0 <= sparse_size <= 16 << 20:
        raise ValueError(f"sparse size {sparse_size} is not a multiple of 512 up to 16777216")
    if threads is not None and not 1 <= threads <= 64:
        raise ValueError(f"threads is {threads}: it must be between 1 and 64")


def _open_source(stack: ExitStack, src: Any, format: str | None, **options: Any) -> Any:
    several = isinstance(src, Sequence) and not isinstance(src, (str, bytes))
    parts = []
    for part in src if several else [src]:
        disk, owned = open_disk(part, format, **options)
        if owned:
            stack.callback(disk.close)
        parts.append(disk)
    if not parts:
        raise ValueError("no source is given")
    return parts[0] if len(parts) == 1 else ConcatDisk(parts)


def _open_existing(
    stack: ExitStack, dst: Any, format: str, cache: str, references: Any, key: Any, lock: bool
) -> Any:
    if is_disk(dst):
        return dst
    options = {"references": references, "lock": lock}
    if key is not None and not isinstance(key, (bytes, bytearray, memoryview, str)):
        # Only what knows images by name can tell the target's key from the source's.
        options["key"] = key
    target, _ = open_disk(dst, format, mode="r+", cache=cache, **options)
    stack.callback(target.close)
    return target


def _create(
    stack: ExitStack,
    path: Any,
    format: str,
    size: int,
    cache: str,
    references: Any,
    options: dict[str, Any],
) -> Any:
    """The new target, empty and open."""
    encryption = options["encryption"]
    if format == "qcow2":
        import qcow2x

        qcow2x.create(path, size, **options)
        target: Any = qcow2x.open(
            path,
            "r+",
            cache=cache,
            references=_allow_only(options["backing_file"], options["data_file"], references),
            key=None if encryption is None else encryption.key,
        )
    else:
        hints = {name: options[name] for name in ("preallocation", "nocow", "extent_size_hint")}
        target = _create_plain(path, format, size, cache, encryption, hints)
    stack.callback(target.close)
    return target


def _create_plain(
    path: Any,
    format: str,
    size: int,
    cache: str,
    encryption: Encryption | None,
    hints: dict[str, Any],
) -> Any:
    from qcow2x.ops.newfile import create_luks, create_raw

    if format == "luks":
        from qcow2x.ops.luks import LuksFile

        assert encryption is not None
        create_luks(path, size, encryption, **hints)
        return LuksFile(path, "r+", cache, key=encryption.key)
    create_raw(path, size, **hints)
    disk = RawDisk(path, "r+", cache)
    if disk.size > size:
        # Made in whole sectors, but a copy of a disk that ends inside one ends there too.
        disk.resize(size, shrink=True)
    return disk


def _allow_only(backing_file: str | None, data_file: Any, references: Any) -> Any:
    """The policy for opening the new target: the caller named its files, and no others."""
    if references == "follow" or callable(references):
        return references
    names = {name if name is None else os.fsdecode(name) for name in (backing_file, data_file)}
    return lambda reference: reference.path if reference.name in names else None


@contextmanager
def _creating() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, Qcow2Error) as exc:
        locate(exc, "creating")
        raise


def _zeros_from(target: Any, size: int, is_fresh: bool) -> int:
    """Where the part of the target begins that reads as zeros before anything is written."""
    if not is_fresh or getattr(target, "format", "") == "luks":
        # Zeros of the host decrypt to anything but zeros.
        return size
    backing = getattr(image_of(target), "backing", None)
    if backing is None:
        return 0
    length = backing.size if isinstance(backing.size, int) else backing.size()
    return min(size, -(-length // SECTOR) * SECTOR)


def _host_bytes(dst: Any) -> int:
    try:
        return os.stat(dst).st_blocks * 512
    except (OSError, TypeError):
        return 0


# --- persistent bitmaps --------------------------------------------------------------------


def _bitmap_source(source: Any, wanted: str) -> Any:
    """The image whose bitmaps are to be copied, once it is known that they can be."""
    if wanted == "none":
        return None
    if isinstance(source, ConcatDisk):
        raise ValueError("Copying bitmaps only possible with single source")
    image = image_of(source)
    if image is None or image.info().compat == "0.10":
        raise ValueError("Source lacks bitmap support")
    if wanted == "all":
        # From the last to the first, as QEMU names them.
        for name, _, inconsistent in reversed(image.bitmaps.layout()):
            if inconsistent:
                raise BrokenBitmap(name, image.name)
    return image


def _check_bitmap_target(source: Any, target: Any) -> None:
    image = image_of(target)
    if source is not None and (image is None or image.info().compat == "0.10"):
        format = getattr(target, "driver", None) or ("qcow2" if image is not None else "raw")
        raise ValueError(f"Format driver '{format}' does not support bitmaps")


def _copy_bitmaps(source: Any, target: Any, wanted: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """After the content, which they would take for changes. Names of those copied and left out."""
    copied: list[str] = []
    skipped: list[str] = []
    if source is None:
        return (), ()
    image = image_of(target)
    for name, granularity, inconsistent in source.bitmaps.layout():
        if inconsistent:
            skipped.append(name)
            continue
        image.bitmaps.add(name, granularity, source.bitmaps[name].enabled)
        image.bitmaps.merge(name, [(source, name)])
        copied.append(name)
    return tuple(copied), tuple(skipped)


def _refuse_own_source(source: Any, dst: Any) -> None:
    """Raise ValueError if *dst* is one of the files that are being read."""
    try:
        there = os.stat(dst)
    except FileNotFoundError:
        return
    for name in names_under(source):
        try:
            same = os.path.samestat(os.stat(name), there)
        except (OSError, ValueError):
            continue
        if same:
            raise ValueError(f"{os.fsdecode(dst)}: the target is one of the files to read from")
