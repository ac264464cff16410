"""Changing what an image is without copying it: ``qemu-img amend`` as a function."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from qcow2x.errors import UnsupportedFeature

if TYPE_CHECKING:
    from qcow2x.image import Image

__all__ = ["amend"]

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_ZERO = 2  # a run that reads as zeros, as include/qcow2x/plan.h has it


def amend(
    image: Any,
    *,
    compat: str | None = None,
    refcount_bits: int | None = None,
    lazy_refcounts: bool | None = None,
    data_file: str | os.PathLike[str] | None = None,
    key: Any = None,
    new_key: Any = None,
    key_slot: int | None = None,
    iter_time_ms: int = 2000,
    erase_key: Any = None,
    erase_slot: int | None = None,
    force: bool = False,
    references: Any = "deny",
) -> None:
    """Changes an image in place; what is None stays.

    ``image`` is a path, or an image open with mode ``"r+"`` that nothing else writes to meanwhile.

    ``compat`` ``"1.1"`` or ``"0.10"``. Going down turns zero flags into unmapped clusters or written
    zeros first, and is refused with UnsupportedFeature for what version 2 cannot say: extended L2
    entries, zstd, an external data file, lazy refcounts, refcounts of another width than 16 bits
    (unless changed in the same call), persistent bitmaps, zero clusters inside internal snapshots.
    ``refcount_bits`` 1 to 64, a power of two; refused if a refcount does not fit, done in a way that a
    cut of power leaves the old or the new refcounts.
    ``lazy_refcounts`` sets or clears the feature bit (refcounts are kept exact in any case).
    ``data_file`` is a new name for the external data file, which itself is not touched.

    Of a LUKS image: ``new_key`` opens it as well from now on (in ``key_slot``, 0 to 7, or the first that
    is free; ``key`` is one that opens it now; ``iter_time_ms`` is what guessing the new one costs each
    time). ``erase_key`` or ``erase_slot`` makes a key useless for good; the last one only with
    ``force``. A key is bytes, str, or a callable that returns one.

    Durable at return. Raises KeyRequired for a key that opens nothing, ValueError for arguments out of range, and what opening and writing
    raise.
    """
    from qcow2x.image import Image
    from qcow2x.image import open as open_image

    version = None if compat is None else _VERSIONS.get(compat)
    if compat is not None and version is None:
        raise ValueError(f"compat must be one of {', '.join(_VERSIONS)}, not {compat!r}")
    order = None if refcount_bits is None else _order(refcount_bits)
    name = None if data_file is None else os.fsdecode(data_file)
    if name is not None and (not name or "\0" in name):
        raise ValueError("data_file must be a name without NUL characters")
    if erase_key is not None and erase_slot is not None:
        raise ValueError("give erase_key or erase_slot, not both")

    def change(opened: Image) -> None:
        _amend(opened, version, order, lazy_refcounts, name)
        if new_key is not None:
            _slots(opened).add_key(
                opened._file, opened._header, key, new_key, slot=key_slot, iter_time_ms=iter_time_ms
            )
        if erase_key is not None or erase_slot is not None:
            _slots(opened).erase_key(
                opened._file, opened._header, key=erase_key, slot=erase_slot, force=force
            )

    if isinstance(image, Image):
        with image._exclusive:
            change(image)
        return
    with open_image(image, "r+", references=references, key=key) as opened:
        change(opened)


def _slots(image: Image) -> Any:
    from qcow2x import encryption

    if image._header.encryption != "luks":
        raise ValueError(f"{image.name}: has no key slots: it is not encrypted with LUKS")
    return encryption


def _order(bits: int) -> int:
    if bits not in (1, 2, 4, 8, 16, 32, 64):
        raise ValueError(f"refcount_bits must be a power of two from 1 to 64, not {bits}")
    return bits.bit_length() - 1


def _amend(
    image: Image, version: int | None, order: int | None, lazy: bool | None, data_file: str | None
) -> None:
    if not image.writable:
        raise PermissionError(f"{image.name}: is open read-only")
    with image._exclusive:
        header = image._header
        final = version or header.version
        final_order = header.refcount_order if order is None else order
        final_lazy = header.lazy_refcounts if lazy is None else lazy
        if data_file is not None and not header.has_data_file:
            raise ValueError(f"{image.name}: has no external data file to name")
        if final < 3:
            _refuse_for_version_2(image, final_order, final_lazy)
        if final > header.version:
            header.set_version(final)
            image._rewrite_header()
        if final_order != header.refcount_order:
            image._change_refcount_width(final_order)
        if data_file is not None:
            header.data_file = data_file
        if final_lazy != header.lazy_refcounts:
            header.set_lazy_refcounts(final_lazy)
        if final < header.version:
            _drop_zero_flags(image)
            image.flush()
            header.set_version(final)
        image._rewrite_header()
        image.flush()


def _refuse_for_version_2(image: Image, order: int, lazy: bool) -> None:
    header = image._header
    reasons = [
        what
        for holds, what in (
            (header.extended_l2, "extended L2 entries"),
            (header.compression_type != "zlib", f"{header.compression_type} compression"),
            (header.has_data_file, "external data file"),
            (order != 4, f"{1 << order}-bit refcounts"),
            (lazy, "lazy refcounts"),
            (header.bitmap_directory is not None, "persistent bitmaps"),
            (_zeros_in_snapshots(image), "zero clusters in internal snapshots"),
        )
        if holds
    ]
    if reasons:
        raise UnsupportedFeature(
            f"{image.name}: version 2 (compat 0.10) cannot have: {', '.join(reasons)}",
            features=tuple(reasons),
        )


def _zero_runs(image: Image) -> list[tuple[int, int]]:
    at, runs = 0, []
    while at < image.size:
        for start, nbytes, kind, _ in image._plan(at, image.size - at):
            if kind == _ZERO:
                runs.append((start, nbytes))
            at = start + nbytes
    return runs


def _zeros_in_snapshots(image: Image) -> bool:
    for snapshot in image.snapshots:
        with image.snapshots.open(snapshot.id) as then:
            if _zero_runs(then):
                return True
    return False


def _drop_zero_flags(image: Image) -> None:
    """Zeros of the live disk without a flag: unmapped where nothing shows through, else written."""
    for start, nbytes in _zero_runs(image):
        if image._backing is None:
            image._unmap(start, nbytes)
            continue
        blank = bytes(min(nbytes, 1 << 20))
        for at in range(start, start + nbytes, len(blank)):
            image.pwrite(blank[: start + nbytes - at], at)
