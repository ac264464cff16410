"""The runtime options of a qcow2 image as QEMU has them, and what they come down to here.

What has no counterpart in this engine is checked all the same: a command line that QEMU refuses is
refused, and one that it takes is taken.
"""

from __future__ import annotations

from qcow2x.drivers import options as opts
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from qcow2x._core.header import Header

_DEFAULT_L2_CACHE = 32 << 20
_MIN_REFCOUNT_CLUSTERS = 4
_MIN_ENTRY_SIZE = 512
_INT_MAX = (1 << 31) - 1
_UINT_MAX = (1 << 32) - 1
#: More than any disk needs; the engine's own limit for the cache.
_MAX_L2_CACHE = (1 << 40) - 1

#: What single tables may be guarded against overwriting -> from which template on QEMU does it.
_GUARDS = {
    "main-header": "constant",
    "active-l1": "constant",
    "refcount-table": "constant",
    "snapshot-table": "constant",
    "bitmap-directory": "constant",
    "active-l2": "cached",
    "refcount-block": "cached",
    "inactive-l1": "cached",
    "inactive-l2": "all",
}
_TEMPLATES = ("none", "constant", "cached", "all")


class Qcow2Options:
    """What of the options the engine acts on."""

    def __init__(
        self,
        l2_cache_size: int | None,
        overlap_check: str,
        lazy_refcounts: bool,
        discard_to_host: bool,
        key_secret: str | None,
    ) -> None:
        self.l2_cache_size = l2_cache_size
        #: A level of qcow2x.open(overlap_check=).
        self.overlap_check = overlap_check
        #: Refcounts wait for the close.
        self.lazy_refcounts = lazy_refcounts
        #: Freed clusters are given back to the host.
        self.discard_to_host = discard_to_host
        self.key_secret = key_secret


def take(options: Options, header: Header, unmap: bool) -> Qcow2Options:
    """Takes the options out of ``options``. ``unmap``: the node passes discards on. Raises
    OptionError in QEMU's words."""
    # What is no switch or no number is told before what does not go together.
    lazy = opts.take_bool(options, "lazy-refcounts", header.lazy_refcounts)
    passes = opts.take_bool(options, "pass-discard-request", unmap)
    opts.take_bool(options, "pass-discard-snapshot")
    opts.take_bool(options, "pass-discard-other")
    no_unref = opts.take_bool(options, "discard-no-unref")
    switches = {
        name: opts.take_bool(options, f"overlap-check.{name}")
        for name in _GUARDS
        if f"overlap-check.{name}" in options
    }
    interval = opts.take_number(options, "cache-clean-interval")
    l2_cache_size = _cache_sizes(options, header)
    if interval is not None and interval > _UINT_MAX:
        raise OptionError("Cache clean interval too big")
    if lazy and header.version < 3:
        raise OptionError(
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
        )
    overlap_check = _overlap_check(options, switches)
    if no_unref and header.version < 3:
        raise OptionError("discard-no-unref is only supported since qcow2 version 3")
    _check_encryption(opts.take_text(options, "encrypt.format"), header)
    secret = opts.take_text(options, "encrypt.key-secret")
    return Qcow2Options(l2_cache_size, overlap_check, lazy, passes, secret)


def join(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """What is in force when ``new`` options are given to an image that was opened with ``old``."""
    kept = dict(old)
    if "overlap-check" in new or "overlap-check.template" in new:
        # A new template says everything about what is guarded.
        kept = {key: value for key, value in kept.items() if not key.startswith("overlap-check")}
    if "cache-size" in new:
        kept.pop("l2-cache-size", None)
        kept.pop("refcount-cache-size", None)
    joined = {**kept, **new}
    if "cache-size" not in new and {"cache-size", "l2-cache-size", "refcount-cache-size"} <= set(
        joined
    ):
        # Both sizes outright make an older sum of them void.
        del joined["cache-size"]
    return joined


def _cache_sizes(options: Options, header: Header) -> int | None:
    """Bytes for the L2 cache; None for the default."""
    cluster = header.cluster_size
    combined = opts.take_size(options, "cache-size")
    l2_given = opts.take_size(options, "l2-cache-size")
    entry_given = opts.take_size(options, "l2-cache-entry-size")
    refcount_given = opts.take_size(options, "refcount-cache-size")

    entry_bytes = 16 if header.extended_l2 else 8
    all_l2 = -(-header.size // cluster) * entry_bytes
    all_l2 = -(-all_l2 // cluster) * cluster
    l2 = min(all_l2, _DEFAULT_L2_CACHE if l2_given is None else l2_given)
    refcount = refcount_given or 0
    least_refcount = _MIN_REFCOUNT_CLUSTERS * cluster
    if combined is not None:
        if l2_given is not None and refcount_given is not None:
            raise OptionError(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            )
        if l2_given is not None and l2_given > combined:
            raise OptionError("l2-cache-size may not exceed cache-size")
        if refcount > combined:
            raise OptionError("refcount-cache-size may not exceed cache-size")
        if l2_given is not None:
            refcount = combined - l2
        elif refcount_given is not None:
            l2 = combined - refcount
        elif combined >= all_l2 + least_refcount:
            l2, refcount = all_l2, combined - all_l2
        else:
            refcount = min(combined, least_refcount)
            l2 = combined - refcount
    entry = cluster if entry_given is None else entry_given
    if entry_given is None and l2 < all_l2:
        entry = min(cluster, 4096)
    if not _MIN_ENTRY_SIZE <= entry <= cluster or entry & (entry - 1):
        raise OptionError(
            f"L2 cache entry size must be a power of two between {_MIN_ENTRY_SIZE} and the "
            f"cluster size ({cluster})"
        )
    if l2 // entry > _INT_MAX:
        raise OptionError("L2 cache size too big")
    if refcount // cluster > _INT_MAX:
        raise OptionError("Refcount cache size too big")
    if combined is None and l2_given is None:
        return None
    # QEMU keeps two entries at least, and so does the engine with its own.
    return min(max(l2, 2 * entry), _MAX_L2_CACHE)


def _overlap_check(options: Options, switches: dict[str, bool]) -> str:
    outright = opts.take_text(options, "overlap-check")
    template = opts.take_text(options, "overlap-check.template")
    if outright is not None and template is not None and outright != template:
        raise OptionError(
            f"Conflicting values for qcow2 options 'overlap-check' ('{outright}') and "
            f"'overlap-check.template' ('{template}')"
        )
    level = outright or template or "cached"
    if level not in _TEMPLATES:
        raise OptionError(
            f"Unsupported value '{level}' for qcow2 option 'overlap-check'. Allowed are any of "
            f"the following: {', '.join(_TEMPLATES)}"
        )
    # The engine has QEMU's levels only: the lowest that guards everything that is to be guarded.
    reached = _TEMPLATES.index(level)
    wanted = [
        _TEMPLATES.index(since)
        for name, since in _GUARDS.items()
        if switches.get(name, _TEMPLATES.index(since) <= reached)
    ]
    return _TEMPLATES[max(wanted, default=0)]


def _check_encryption(stated: str | None, header: Header) -> None:
    actual = header.encryption
    if stated is None or stated == actual:
        return
    if actual is None:
        raise OptionError(f"No encryption in image header, but options specified format '{stated}'")
    raise OptionError(
        f"Header reported '{actual}' encryption format but options specify '{stated}'"
    )
