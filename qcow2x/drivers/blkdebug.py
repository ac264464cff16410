"""``blkdebug``: a filter that makes requests fail or wait, by rules, and that has limits of its own.

It hears where the image above it is (``at_site``) and knows the events of QEMU by the same names.
"""

from __future__ import annotations

from collections.abc import Iterator

from qcow2x.drivers import options as opts
from qcow2x.drivers.blkdebug_rules import Rules, take_rules
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.filter import FilterNode
from qcow2x.drivers.hooks import HookStorage
from qcow2x.drivers.options import Options
from qcow2x.storage import PyStorage
from qcow2x.types import Extent

_INT_MAX = (1 << 31) - 1
#: The most that is written of zeros at once where zeroing has to be done by writing.
_BOUNCE_BYTES = 1 << 20

_RULE_OPTIONS = ("inject-error.", "set-state.")

#: The engine's sites (include/qcow2x/status.h) -> QEMU's events. An access that is one here and two
#: in QEMU is both.
EVENTS_AT = {
    "l1_update": ("l1_update",),
    "l1_grow_alloc": ("l1_grow_alloc_table",),
    "l1_grow_write": ("l1_grow_write_table",),
    "l1_grow_activate": ("l1_grow_activate_table",),
    "l2_load": ("l2_load",),
    "l2_update": ("l2_update",),
    "l2_alloc_cow_read": ("l2_alloc_cow_read",),
    "l2_alloc_write": ("l2_alloc_write",),
    "reftable_read": ("reftable_load",),
    "reftable_update": ("refblock_alloc_hookup", "reftable_update"),
    "reftable_grow_write": ("refblock_alloc_write_blocks", "refblock_alloc_write_table"),
    "reftable_grow_activate": ("refblock_alloc_switch_table",),
    "refblock_update": ("refblock_update_part",),
    "refblock_alloc": ("refblock_alloc",),
    # QEMU says these two whenever it changes a refcount, and none of them when it looks for a free
    # cluster: what it has to load for that fails on its own.
    "refcount_raise": ("refblock_alloc", "refblock_load"),
    "refblock_alloc_write": ("refblock_alloc_write",),
    "data_read": ("read_aio",),
    "data_write": ("write_aio",),
    "compressed_read": ("read_compressed",),
    "compressed_write": ("write_compressed",),
    "backing_read": ("read_backing_aio",),
    "cow_read": ("cow_read",),
    # Guest data and what is copied beside it go in one write.
    "cow_write": ("cow_write", "write_aio"),
    "cluster_alloc": ("cluster_alloc",),
    "cluster_alloc_bytes": ("cluster_alloc_bytes",),
    "cluster_free": ("cluster_free",),
    "empty_image": ("empty_image_prepare",),
    "barrier": ("flush_to_os", "flush_to_disk"),
    "flush": ("flush_to_os", "flush_to_disk"),
}


class BlkdebugNode(FilterNode):
    driver = "blkdebug"
    is_protocol = True
    primary = "image"
    strong = (
        "config",
        "inject-error.",
        "set-state.",
        "align",
        "max-transfer",
        "opt-write-zero",
        "max-write-zero",
        "opt-discard",
        "max-discard",
    )
    rules: Rules
    #: What its rules are made from: the same for a node that is opened again with the same options.
    rules_key: str
    _unflushed = False

    @classmethod
    def parse_filename(cls, filename: str, options: Options) -> None:
        if not filename.startswith("blkdebug:"):
            options["x-image"] = filename
            return
        config, colon, image = filename.removeprefix("blkdebug:").partition(":")
        if not colon:
            raise OptionError("blkdebug requires both config file and image path")
        if config:
            options["config"] = config
        options["x-image"] = image

    def open(self, options: Options) -> None:
        self._config = opts.take_text(options, "config")
        self.rules_key = _rules_key(options, self._config)
        self.rules = take_rules(options, self._config)
        before = self.graph.rules.get(self.rules_key)
        if before:
            self.rules = before.pop(0)
        for key in [k for k in options if k.startswith(("take-child-", "unshare-child-"))]:
            # What these change is kept by QEMU's jobs only.
            del options[key]
        filename = opts.take_text(options, "x-image")
        self.graph.open_child(self, "image", options, filename)
        self._take_limits(options)
        self.storage = PyStorage(_Listening(self), self.writable)
        if before is None:
            self.rules.event("none")

    def _take_limits(self, options: Options) -> None:
        self._align = opts.take_size(options, "align") or 1
        if self._align >= _INT_MAX or self._align & (self._align - 1):
            raise OptionError(f"Cannot meet constraints with align {self._align}")

        def limit(key: str, unit: int) -> int:
            value = opts.take_size(options, key) or 0
            if value >= _INT_MAX or value % unit:
                raise OptionError(f"Cannot meet constraints with {key} {value}")
            return value

        self._max_transfer = limit("max-transfer", self._align)
        self._opt_zero = limit("opt-write-zero", self._align)
        self._max_zero = limit("max-write-zero", max(self._opt_zero, self._align))
        self._opt_discard = limit("opt-discard", self._align)
        self._max_discard = limit("max-discard", max(self._opt_discard, self._align))

    @property
    def debug(self) -> Rules:
        return self.rules

    def at_event(self, event: str) -> None:
        self.rules.event(event)

    def own_filename(self) -> str | None:
        image = self.children["image"].exact_filename
        if not image or not set(self._strong_options()[0]) <= {"driver", "config"}:
            return ""
        return f"blkdebug:{self._config or ''}:{image}"

    # ---- Reading ----

    def _read(self, view: memoryview, offset: int) -> None:
        start = offset - offset % self._align
        end = -(-(offset + len(view)) // self._align) * self._align
        if (start, end) != (offset, offset + len(view)):
            whole = memoryview(bytearray(end - start))
            self._read(whole, start)
            view[:] = whole[offset - start :][: len(view)]
            return
        step = self._max_transfer or len(view)
        for at in range(0, len(view), step):
            piece = view[at : at + step]
            self.rules.check(offset + at, len(piece), "read", self.name)
            super()._read(piece, offset + at)

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        while offset < end:
            start = offset - offset % self._align
            stop = -(-end // self._align) * self._align
            self.rules.check(start, stop - start, "block-status", self.name)
            run = next(super()._extents(offset, end))
            yield run
            offset += run.length

    # ---- Writing ----

    def _write(self, view: memoryview, offset: int, fua: bool) -> None:
        if self._align == 1:
            self._write_aligned(view, offset, fua)
            return
        start = offset - offset % self._align
        end = -(-(offset + len(view)) // self._align) * self._align
        with self.writing:
            if (start, end) == (offset, offset + len(view)):
                self._write_aligned(view, offset, fua)
                return
            # What else is in the first and the last block is read and written back.
            whole = memoryview(bytearray(end - start))
            for edge in sorted({start, end - self._align}):
                self._read(whole[edge - start :][: self._align], edge)
            whole[offset - start :][: len(view)] = view
            self._write_aligned(whole, start, fua)

    def _write_aligned(self, view: memoryview, offset: int, fua: bool) -> None:
        self._unflushed = True
        self.rules.event("pwritev")
        step = self._max_transfer or len(view)
        for at in range(0, len(view), step):
            piece = view[at : at + step]
            self.rules.check(offset + at, len(piece), "write", self.name)
            super()._write(piece, offset + at, fua)
        self.rules.event("pwritev_done")

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        end = offset + length
        low = min(end, -(-offset // self._align) * self._align)
        high = max(low, end - end % self._align)
        if low > offset:
            self._write(memoryview(bytes(low - offset)), offset, fua)
        self._unflushed = True
        self.rules.event("pwritev_zero")
        unit = max(self._opt_zero, self._align)
        limit = self._max_zero or high - low
        while low < high:
            nbytes = high - low
            # Up to a whole unit, then whole units, then the rest.
            if low % unit:
                nbytes = min(nbytes, unit - low % unit)
            elif nbytes > unit:
                nbytes -= high % unit
            nbytes = min(nbytes, limit)
            if nbytes < unit:
                nbytes = min(nbytes, self._max_transfer or _BOUNCE_BYTES)
                self._write_aligned(memoryview(bytes(nbytes)), low, fua)
            else:
                self.rules.check(low, nbytes, "write-zeroes", self.name)
                super()._zero(low, nbytes, unmap, fua)
            low += nbytes
        self.rules.event("pwritev_done")
        if end > high:
            self._write(memoryview(bytes(end - high)), high, fua)

    def _discard(self, offset: int, length: int) -> None:
        end = offset + length
        unit = max(self._opt_discard, self._align)
        limit = self._max_discard or length
        while offset < end:
            nbytes = end - offset
            if offset % unit:
                nbytes = min(nbytes, unit - offset % unit)
                if nbytes % self._align:
                    nbytes %= self._align
            elif end % unit:
                if nbytes > unit:
                    nbytes -= end % unit
                elif nbytes % self._align and nbytes > self._align:
                    nbytes -= nbytes % self._align
            nbytes = min(nbytes, limit)
            # A piece of a block is nobody's to discard.
            if nbytes >= self._align:
                self.rules.check(offset, nbytes, "discard", self.name)
                super()._discard(offset, nbytes)
            offset += nbytes

    def _flush(self) -> None:
        # As in QEMU a flush with nothing to flush never comes here.
        if self._unflushed:
            self.rules.check(0, 0, "flush", self.name)
            super()._flush()
            self._unflushed = False


def _rules_key(options: Options, config: str | None) -> str:
    given = [(k, opts.as_text(v)) for k, v in options.items() if k.startswith(_RULE_OPTIONS)]
    return repr((config, sorted(given)))


class _Listening(HookStorage):
    """The storage of a blkdebug node: told where the image above it is."""

    def __init__(self, node: BlkdebugNode) -> None:
        super().__init__(node)
        self._rules = node.rules

    def at_site(self, site: str) -> None:
        for event in EVENTS_AT.get(site, ()):
            self._rules.event(event)
