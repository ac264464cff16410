"""Changing what an image is without copying it: ``qemu-img amend`` as a function."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from qcow2x.errors import UnsupportedFeature
from qcow2x.ops.plainzeros import drop_zero_flags
from qcow2x.snapshot import check_l1

if TYPE_CHECKING:
    from qcow2x.image import Image
    from qcow2x.types import Progress

__all__ = ["amend"]

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
# Kinds of runs, as in include/qcow2x/plan.h.
_ZERO, _COMPRESSED = 2, 3
_INCOMPAT_DIRTY, _INCOMPAT_COMPRESSION = 1, 8
_OFFSET_MASK = 0x00FFFFFFFFFFFE00


def amend(
    image: Any,
    *,
    compat: str | None = None,
    refcount_bits: int | None = None,
    lazy_refcounts: bool | None = None,
    data_file: str | os.PathLike[str] | None = None,
    data_file_raw: bool | None = None,
    size: int | None = None,
    key: Any = None,
    new_key: Any = None,
    key_slot: int | None = None,
    iter_time_ms: int = 2000,
    erase_key: Any = None,
    erase_slot: int | None = None,
    force: bool = False,
    references: Any = "deny",
    progress: Progress | None = None,
) -> None:
    """Changes an image in place; what is None stays.

    ``image`` is a path, or an image open with mode ``"r+"`` that nothing else writes to meanwhile.

    ``compat`` ``"1.1"`` or ``"0.10"``. Going down clears the lazy refcounts bit, turns zero flags into
    unmapped clusters or written zeros, and is refused with UnsupportedFeature for what version 2
    cannot say: extended L2 entries, clusters compressed with zstd, an external data file, refcounts
    of another width than 16 bits (unless changed in the same call), persistent bitmaps, snapshots
    of a disk of another size than this one has after ``size`` was set.
    ``refcount_bits`` 1 to 64, a power of two; refused if a refcount does not fit, done in a way that a
    cut of power leaves the old or the new refcounts.
    ``lazy_refcounts`` sets or clears the feature bit: see :func:`qcow2x.open`.
    ``data_file`` is a new name for the external data file, which itself is not touched;
    ``data_file_raw=False`` takes back the promise that it reads as the disk by itself.
    ``size`` is the disk's new size in bytes; a smaller one loses what lies behind it.

    Of a LUKS image: ``new_key`` opens it as well from now on (in ``key_slot``, 0 to 7, or the first that
    is free; ``key`` is one that opens it now; ``iter_time_ms`` is what guessing the new one costs each
    time). ``erase_key`` or ``erase_slot`` makes a key useless for good; the last one only with
    ``force``, which also lets ``new_key`` take the place of another one. A key is bytes, str, or a
    callable that returns one.

    ``progress(done, total, phase)`` counts the steps. Durable at return. Raises KeyRequired for a key
    that opens nothing, ValueError for arguments out of range, and what opening and writing raise.
    """
    from qcow2x.image import Image
    from qcow2x.image import open as open_image

    version = None if compat is None else _VERSIONS.get(compat)
    if compat is not None and version is None:
        raise ValueError(f"Unknown compatibility level {compat}")
    order = None if refcount_bits is None else _order(refcount_bits)
    name = None if data_file is None else os.fsdecode(data_file)
    if name is not None and "\0" in name:
        raise ValueError("data_file must be a name without NUL characters")
    wanted = _Wanted(version, order, lazy_refcounts, name, data_file_raw, size)
    keys = _Keys(key, new_key, key_slot, iter_time_ms, erase_key, erase_slot, force)

    def change(opened: Image) -> None:
        if not opened.writable:
            raise PermissionError(f"{opened.name}: is open read-only")
        with opened._exclusive:
            _amend(opened, wanted, keys, progress)

    if isinstance(image, Image):
        change(image)
        return
    with open_image(image, "r+", references=references, key=key) as opened:
        change(opened)


class _Wanted(NamedTuple):
    """What the image is to be; None for what stays."""

    version: int | None
    order: int | None
    lazy: bool | None
    data_file: str | None
    data_file_raw: bool | None
    size: int | None


class _Keys(NamedTuple):
    """What is to happen to the key slots."""

    key: Any
    new_key: Any
    slot: int | None
    iter_time_ms: int
    erase_key: Any
    erase_slot: int | None
    force: bool

    def __bool__(self) -> bool:
        return any(it is not None for it in (self.new_key, self.erase_key, self.erase_slot))

    def change(self, image: Image) -> None:
        from qcow2x import encryption

        place = (image._file, image._header)
        if self.new_key is not None:
            encryption.add_key(
                *place,
                self.key,
                self.new_key,
                slot=self.slot,
                iter_time_ms=self.iter_time_ms,
                force=self.force,
            )
        if self.erase_key is not None or self.erase_slot is not None:
            encryption.erase_key(*place, key=self.erase_key, slot=self.erase_slot, force=self.force)


def _order(bits: int) -> int:
    if bits not in (1, 2, 4, 8, 16, 32, 64):
        raise ValueError("Refcount width must be a power of two and may not exceed 64 bits")
    return bits.bit_length() - 1


def _amend(image: Image, wanted: _Wanted, keys: _Keys, progress: Progress | None) -> None:
    header = image._header
    final = wanted.version or header.version
    final_order = header.refcount_order if wanted.order is None else wanted.order
    final_lazy = header.lazy_refcounts if wanted.lazy is None else wanted.lazy
    _check(image, wanted, keys, final, final_order)
    # The header that is written below shall not carry a dirty bit that is only passing.
    image._settle_refcounts(lazy=False)
    steps = _Steps(
        progress, (final != header.version) + (final_order != header.refcount_order) + bool(keys)
    )
    # Up first, as what is wanted may need it, and down last.
    if final > header.version:
        image.snapshots._complete_fields()
        header.set_version(final)
        image._rewrite_header()
        steps.done("upgrade")
    if keys:
        keys.change(image)
        steps.done("key slots")
    if final_order != header.refcount_order:
        _change_width(image, final_order)
        steps.done("refcounts")
    if wanted.data_file is not None:
        header.data_file = wanted.data_file or None
    if wanted.data_file_raw is False:
        header.keep_raw(False)
    if final_lazy != header.lazy_refcounts:
        header.set_lazy_refcounts(final_lazy)
    image._rewrite_header()
    if wanted.size is not None and wanted.size != image.size:
        image.resize(wanted.size, shrink=True)
    if final < header.version:
        _check_snapshots(image)
        drop_zero_flags(image, lambda done, total: steps.part(done, total, "downgrade"))
        header.use_zlib()
        header.set_version(final)
        image._rewrite_header()
        steps.done("downgrade")
    image._settle_refcounts(lazy=final_lazy and final >= 3)


class _Steps:
    """Tells of each of a few steps; how long one takes is not known before."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def part(self, done: int, total: int, phase: str) -> None:
        """So much of a step is done."""
        if self._progress is not None:
            self._progress(self._done * total + done, self._total * total, phase)

    def done(self, phase: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, phase)


def _check(image: Image, wanted: _Wanted, keys: _Keys, final: int, final_order: int) -> None:
    """Refuses what cannot be, before anything is changed."""
    header = image._header
    where = image.name
    if wanted.data_file is not None and not header.has_data_file:
        raise ValueError(
            f"{where}: data-file can only be set for images that use an external data file"
        )
    if wanted.data_file_raw and not header.data_file_raw:
        raise ValueError(f"{where}: data-file-raw cannot be set on existing images")
    if keys and header.encryption is None:
        raise ValueError(f"{where}: Can't amend encryption options - encryption not present")
    if keys and header.encryption != "luks":
        raise ValueError(f"{where}: Only LUKS encryption options can be amended")
    if keys.erase_key is not None and keys.erase_slot is not None:
        raise ValueError(f"{where}: give erase_key or erase_slot, not both")
    if final >= 3:
        return
    level = "compatibility level 1.1"
    if final_order != 4 and final_order != header.refcount_order:
        raise _refused(
            where,
            f"Refcount widths other than 16 bits require {level} or above (use compat=1.1 or "
            "greater)",
        )
    if wanted.lazy and not header.lazy_refcounts:
        raise _refused(
            where,
            f"Lazy refcounts only supported with {level} and above (use compat=1.1 or greater)",
        )
    if header.version > final:
        _check_downgrade(image, final_order)


def _check_downgrade(image: Image, order: int) -> None:
    header = image._header
    # All their tables will be walked, and changed.
    for snapshot in image.snapshots:
        check_l1(image.name, header, snapshot)
    features = header.incompatible_features & ~_INCOMPAT_DIRTY & ~_INCOMPAT_COMPRESSION
    for holds, what in (
        (order != 4, "compat=0.10 requires refcount_bits=16"),
        (header.has_data_file, "Cannot downgrade an image with a data file"),
        (features, f"Cannot downgrade an image with incompatible features {features:#x} set"),
        (
            # QEMU drops them without a word.
            header.bitmap_directory is not None,
            "Cannot downgrade an image with persistent bitmaps",
        ),
        (
            header.encryption is not None
            and image._backing is not None
            and _any_snapshot_has(image, _ZERO),
            "Cannot downgrade an encrypted image with zero clusters in internal snapshots",
        ),
        (
            header.compression_type != "zlib"
            and (_has(image, _COMPRESSED) or _any_snapshot_has(image, _COMPRESSED)),
            f"Cannot downgrade an image with {header.compression_type} compression type and "
            "existing compressed clusters",
        ),
    ):
        if holds:
            raise _refused(image.name, what)


def _check_snapshots(image: Image) -> None:
    """Asked last: it hangs on the size that the disk has then."""
    for snapshot in image.snapshots:
        # Version 2 has no room for the size of a snapshot's disk, nor for a machine's state of 4 GiB.
        if snapshot.disk_size != image.size or snapshot.vm_state_size >> 32:
            raise _refused(image.name, "Internal snapshots prevent downgrade of image")


def _refused(where: str, what: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"{where}: {what}", features=(what,))


def _change_width(image: Image, order: int) -> None:
    try:
        image._change_refcount_width(order)
    except UnsupportedFeature as exc:
        if exc.offset is None or exc.site != "refblock_load":
            raise
        raise _refused(
            image.name,
            f"Cannot decrease refcount entry width to {1 << order} bits: Cluster at offset "
            f"{exc.offset:#x} has a refcount of {_refcount_at(image, exc.offset)}",
        ) from exc


def _refcount_at(image: Image, host_offset: int) -> int:
    """The refcount in the file of the cluster at this offset; everything is written back."""
    header, file = image._header, image._file
    bits = header.refcount_bits
    block, within = divmod(host_offset // header.cluster_size, header.cluster_size * 8 // bits)
    (entry,) = struct.unpack(">Q", file.pread(8, header.refcount_table_offset + block * 8))
    start = (entry & _OFFSET_MASK) + within * bits // 8
    value = int.from_bytes(file.pread(max(1, bits // 8), start), "big")
    return value if bits >= 8 else value >> within * bits % 8 & (1 << bits) - 1


def _runs_of(image: Image, wanted: int) -> Iterator[tuple[int, int]]:
    """The runs of the disk that are stored in this way in this layer."""
    at = 0
    while at < image.size:
        for start, nbytes, kind, _ in image._plan(at, image.size - at):
            if kind == wanted:
                yield start, nbytes
            at = start + nbytes


def _has(image: Image, kind: int) -> bool:
    return next(_runs_of(image, kind), None) is not None


def _any_snapshot_has(image: Image, kind: int) -> bool:
    for snapshot in image.snapshots:
        with image.snapshots.open(snapshot.id) as then:
            if _has(then, kind):
                return True
    return False
