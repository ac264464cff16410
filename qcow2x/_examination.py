"""How an inspection looks at an image: fields, names, tables, then a sample of the mapping.

:class:`~qcow2x._core.header.Header` decides whether the header is valid, as it does for ``open``; it
stops at the first thing that is wrong, though, so what can be told of a broken image (above all the
files it names) is decoded here once more, by code that takes every field for a lie.
"""

from __future__ import annotations

import os
import posixpath
import re
import struct
from array import array
from collections.abc import Iterator
from itertools import pairwise
from sys import byteorder
from typing import NamedTuple

from qcow2x import magics
from qcow2x._core.header import COMPRESSION_NAMES, ENCRYPTION_NAMES, FEATURE_NAMES, Header
from qcow2x.errors import CorruptImage, FormatError, UnsupportedFeature
from qcow2x.inspection import Anomaly, Inspection, NamedFile, Window, verdict_of

# Shares of the MiB that an inspection may read. All of it together is less.
HEAD_BYTES = 512 << 10
L1_BYTES = 64 << 10
# Python looks at some ten entries a microsecond: more of the tables would take milliseconds.
L2_BYTES = 16 << 10
L2_TABLES = 2
SNAPSHOT_BYTES = 128 << 10
BITMAP_BYTES = 64 << 10
ZSTD_FRAMES = 8

# Limits of QEMU and of include/qcow2x/format.h.
MAX_NAME = 1023
MAX_EXTENSIONS = 1024
MAX_L1_BYTES = 32 << 20
MAX_REFTABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_EXTRA = 1024
MAX_BITMAPS = 65535
MAX_BITMAP_TABLE_BYTES = 1 << 30
# The largest window that a zstd decoder accepts unless told otherwise.
MAX_ZSTD_WINDOW = 128 << 20
# Where nothing is known of the file's size every table fits; offsets have 56 bits.
ENDLESS = 1 << 57

EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441
KNOWN_EXTENSIONS = {
    EXT_BACKING_FORMAT,
    EXT_FEATURE_NAMES,
    EXT_BITMAPS,
    EXT_CRYPTO,
    EXT_DATA_FILE,
}

INCOMPAT_DIRTY, INCOMPAT_CORRUPT, INCOMPAT_DATA_FILE, INCOMPAT_EXTL2 = 1, 2, 4, 16
AUTOCLEAR_BITMAPS = 1
KINDS = ("incompatible", "compatible", "autoclear")
SPOKEN = {"backing": "backing file", "data-file": "external data file"}

_V2 = struct.Struct(">IIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_L1_RESERVED = 0x7F00_0000_0000_01FF
_COMPRESSED = 1 << 62


class Fields(NamedTuple):
    """The header's fixed fields as they stand; those the file has no room for are 0."""

    magic: int
    version: int
    backing_offset: int
    backing_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_offset: int
    rt_offset: int
    rt_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompat: int = 0
    compat: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = 72
    compression_type: int = 0


class Table(NamedTuple):
    """A run of the file that the image claims for metadata."""

    name: str
    offset: int
    nbytes: int
    #: Where in the file it is claimed, to point at.
    claimed_at: int | None


def examine(window: Window, max_virtual_size: int | None, allow_references: bool) -> Inspection:
    """The whole inspection of what ``window`` shows."""
    head = window.read(0, 64 << 10)
    if not head.startswith(magics.QCOW2_MAGIC) or head[4:8] == b"\0\0\0\x01":
        return _not_qcow2(window, head)
    return _Examination(window, head, max_virtual_size, allow_references).inspection()


def _not_qcow2(window: Window, head: bytes) -> Inspection:
    tail = window.read(window.file_size - 512, 512) if window.file_size else b""
    found = magics.format_of(head, tail)
    if found == "unknown":
        message = "this is not a qcow2 image; a raw disk has no mark, and none is guessed"
    else:
        message = f"this is not a qcow2 image but looks like {found}"
    anomaly = Anomaly("not-qcow2", "reject", message, 0)
    others = {entry.format for entry in magics.later_formats(head)} - {found}
    return Inspection(
        format=found,
        valid=False,
        verdict="reject",
        reasons=(message,),
        anomalies=(anomaly,),
        file_size=window.file_size,
        bytes_read=window.bytes_read,
        also_looks_like=tuple(sorted(others)),
    )


class _Examination:
    def __init__(
        self, window: Window, head: bytes, max_virtual_size: int | None, allow_references: bool
    ) -> None:
        self.window = window
        self.max_virtual_size = max_virtual_size
        self.allow_references = allow_references
        self.anomalies: list[Anomaly] = []
        self.references: list[NamedFile] = []
        self.bitmaps: list[str] = []
        self.end = ENDLESS if window.file_size is None else window.file_size
        self.fields = _decode(head)
        bits = self.fields.cluster_bits
        #: 0 where the header gives no possible size.
        self.cluster_size = 1 << bits if 9 <= bits <= 21 else 0
        more = min(self.cluster_size, HEAD_BYTES) - len(head)
        if more > 0 and len(head) == 64 << 10:
            head += window.read(len(head), more)
        self.head = head
        self.cluster = head[: self.cluster_size]
        #: Bytes of the header cluster, or of the file if that is shorter, that were not seen.
        self.hidden = max(0, min(self.cluster_size, self.end) - len(self.cluster))
        self.extensions: list[tuple[int, bytes, int]] = []
        self.tables: list[Table] = []

    def note(self, code: str, message: str, offset: int | None = None) -> None:
        self.anomalies.append(Anomaly(code, "note", message, offset))

    def caution(self, code: str, message: str, offset: int | None = None) -> None:
        self.anomalies.append(Anomaly(code, "caution", message, offset))

    def reject(self, code: str, message: str, offset: int | None = None) -> None:
        self.anomalies.append(Anomaly(code, "reject", message, offset))

    def inspection(self) -> Inspection:
        f = self.fields
        extensions_end = self._walk_extensions()
        name, format_name, name_end = self._backing_name()
        features = [self._features(kind) for kind in range(3)]
        self._check_fields()
        self._check_references(name, format_name)
        if name_end:
            self._check_slack(extensions_end, f.backing_offset)
        self._check_slack(max(extensions_end, name_end), self.cluster_size)
        polyglots = self._check_polyglots()
        self._claim_tables()
        self._check_tables()
        valid = self._judge(name)
        if valid:
            self._sample_mapping()
        verdict, reasons = verdict_of(self.anomalies)
        known = f.version in (2, 3)
        bitmaps = self._bitmaps_claim()
        return Inspection(
            format="qcow2",
            valid=valid,
            verdict=verdict,
            reasons=reasons,
            anomalies=tuple(self.anomalies),
            references=tuple(self.references),
            file_size=self.window.file_size,
            bytes_read=self.window.bytes_read,
            version=f.version,
            virtual_size=f.size if known else None,
            cluster_size=self.cluster_size or None,
            refcount_bits=1 << f.refcount_order if f.refcount_order <= 6 else None,
            compression_type=COMPRESSION_NAMES.get(f.compression_type),
            encryption=ENCRYPTION_NAMES.get(f.crypt_method, f"unknown method {f.crypt_method}"),
            incompatible_features=features[0],
            compatible_features=features[1],
            autoclear_features=features[2],
            snapshot_count=f.nb_snapshots,
            bitmap_count=bitmaps[0] if bitmaps else 0,
            bitmaps=tuple(self.bitmaps),
            also_looks_like=polyglots,
        )

    # ---- The header cluster ----

    def _judge(self, backing_name: str) -> bool:
        """Whether Header takes it; what it says, unless that has been found already."""
        if self.hidden and len(self.head) < HEAD_BYTES:
            self.reject(
                "incomplete",
                f"only {len(self.head)} bytes have been seen; the header cluster has "
                f"{self.cluster_size}",
            )
            return False
        # A name that was fetched from further on is in its place, as it is for open().
        cluster = bytearray(self.cluster)
        at = self.fields.backing_offset
        name = os.fsencode(backing_name)
        if name and len(cluster) < at + len(name) <= self.cluster_size:
            cluster = cluster[:at].ljust(at, b"\0") + name
        try:
            Header.parse(bytes(cluster), self.end, "")
        except UnsupportedFeature as exc:
            self._parser_says("unsupported", exc)
        except FormatError as exc:
            self._parser_says("invalid-header", exc)
        except CorruptImage as exc:
            self._parser_says("corrupt-header", exc)
        else:
            return True
        return False

    def _parser_says(self, code: str, exc: FormatError | CorruptImage) -> None:
        known = any(
            item.severity == "reject" and item.offset == exc.offset is not None
            for item in self.anomalies
        )
        if not known:
            self.reject(code, str(exc).removeprefix(": "), exc.offset)

    def _walk_extensions(self) -> int:
        """Takes the extensions that can be read; returns where they end."""
        f = self.fields
        at: int = f.header_length
        end = f.backing_offset if 0 < f.backing_offset <= self.cluster_size else self.cluster_size
        seen = set()
        while at + 8 <= end:
            if at + 8 > len(self.cluster):
                if self.hidden:
                    self._extensions_unseen(at)
                return at
            kind, nbytes = struct.unpack_from(">II", self.cluster, at)
            if kind == 0:
                # Past its length the end marker has nothing to say, but some writers give it one.
                return at + 8
            if at + 8 + nbytes > end:
                self.reject(
                    "extension-overrun",
                    f"header extension {kind:#010x} of {nbytes} bytes is longer than the "
                    f"{end - at - 8} bytes that remain for it",
                    at,
                )
                return at + 8
            if len(self.extensions) == MAX_EXTENSIONS:
                self.reject(
                    "limit-extensions", f"there are more than {MAX_EXTENSIONS} extensions", at
                )
                return at
            if kind in KNOWN_EXTENSIONS and kind in seen:
                self.reject("extension-twice", f"header extension {kind:#010x} is there twice", at)
            elif kind not in KNOWN_EXTENSIONS and kind not in seen:
                self.note("unknown-extension", f"header extension {kind:#010x} is unknown", at)
            seen.add(kind)
            self.extensions.append((kind, self.cluster[at + 8 : at + 8 + nbytes], at))
            at += 8 + (nbytes + 7 & ~7)
            if at > len(self.cluster) and self.hidden:
                self._extensions_unseen(at)
                return at
        return at

    def _extensions_unseen(self, at: int) -> None:
        # They could name a data file: what cannot be seen cannot be vouched for.
        self.reject(
            "extensions-unseen",
            f"the header extensions go on beyond the first {len(self.cluster)} bytes, which are "
            "all that is looked at",
            at,
        )

    def _extension(self, kind: int) -> tuple[bytes, int] | None:
        for found, data, at in self.extensions:
            if found == kind:
                return data, at
        return None

    def _text(self, kind: int) -> str | None:
        found = self._extension(kind)
        if found is None:
            return None
        return os.fsdecode(found[0].split(b"\0", 1)[0]) or None

    def _features(self, kind: int) -> tuple[str, ...]:
        f = self.fields
        bits = (f.incompat, f.compat, f.autoclear)[kind]
        known = {bit: name.decode() for of, bit, name in FEATURE_NAMES if of == kind}
        given: dict[int, str] = {}
        unknown = [bit for bit in range(64) if bits >> bit & 1 and bit not in known]
        if unknown:
            given = self._names_given(kind)
            at = 72 + 8 * kind
            listed = ", ".join(given.get(bit, f"bit {bit}") for bit in unknown)
            if kind == 0:
                message = f"the image needs features that are not supported: {listed}"
                self.reject("unknown-feature", message, at)
            else:
                message = f"reserved bits of the {KINDS[kind]} features are set: {listed}"
                self.note("reserved-bits", message, at)
        return tuple(
            known.get(bit) or given.get(bit) or f"unknown bit {bit}"
            for bit in range(64)
            if bits >> bit & 1
        )

    def _names_given(self, kind: int) -> dict[int, str]:
        """The image's own names for feature bits, quoted as such: it may call them anything."""
        found = self._extension(EXT_FEATURE_NAMES)
        names: dict[int, str] = {}
        table = found[0][: 48 * 3 * 64] if found else b""
        for at in range(0, len(table) - 47, 48):
            bit = table[at + 1]
            if table[at] == kind and bit < 64:
                raw = table[at + 2 : at + 48].split(b"\0", 1)[0]
                names[bit] = f"unknown bit {bit} ({quoted(raw.decode('utf-8', 'replace'))})"
        return names

    def _check_fields(self) -> None:
        f = self.fields
        if f.version == 3 and f.header_length > 112:
            unknown = self.cluster[112 : f.header_length]
            message = f"header_length is {f.header_length}; 112 bytes are known"
            if unknown.strip(b"\0"):
                self.caution("unknown-fields", f"{message}, and the rest is not zero", 112)
            else:
                self.note("unknown-fields", message, 100)
        if f.version == 3 and f.header_length >= 112 and self.cluster[105:112].strip(b"\0"):
            self.note("reserved-bits", "padding of the header fields is not zero", 105)
        if f.size % 512:
            self.caution(
                "size-unaligned", f"the disk size {f.size} is not a multiple of 512 bytes", 24
            )
        if self.max_virtual_size is not None and f.size > self.max_virtual_size:
            self.reject(
                "limit-virtual-size",
                f"the disk has {f.size} bytes; {self.max_virtual_size} are allowed",
                24,
            )
        if f.nb_snapshots > MAX_SNAPSHOTS:
            self.reject("limit-snapshots", f"there are {f.nb_snapshots} snapshots", 60)
        if f.incompat & INCOMPAT_CORRUPT:
            self.caution("corrupt-bit", "the image is marked corrupt", 72)
        if f.incompat & INCOMPAT_DIRTY:
            self.caution("dirty-bit", "the image was not closed; refcounts may be stale", 72)
        if f.crypt_method == 1:
            self.note("weak-encryption", "the legacy AES-CBC encryption protects little", 32)

    def _check_slack(self, start: int, end: int) -> None:
        """Every known writer leaves zeros where the header cluster holds nothing."""
        slack = self.cluster[start:end]
        if slack != bytes(len(slack)):
            self.caution(
                "header-slack",
                "the header cluster holds bytes that belong to neither fields, extensions nor the "
                "backing file name",
                start + len(slack) - len(slack.lstrip(b"\0")),
            )

    def _check_polyglots(self) -> tuple[str, ...]:
        found = []
        for magic in magics.later_formats(self.head[: magics.REACH]):
            found.append(magic.format)
            message = f"the file can also be taken for {magic.format}"
            # Behind the header cluster a guest's own data may happen to lie there.
            if magic.offset < self.cluster_size:
                self.reject("polyglot", message, magic.offset)
            else:
                self.caution("polyglot", message, magic.offset)
        size = self.window.file_size
        if size is not None and magics.has_vhd_footer(self.window.read(size - 512, 512)):
            found.append("vhd")
            self.caution("polyglot", "the file ends in the footer of a fixed VHD", size - 512)
        return tuple(dict.fromkeys(found))

    # ---- Names ----

    def _backing_name(self) -> tuple[str, str | None, int]:
        """The backing file's name ("" if there is none), its format, and where the name ends."""
        f = self.fields
        fmt = self._text(EXT_BACKING_FORMAT)
        if not f.backing_offset:
            if fmt is not None:
                self.note("unused-backing-format", f"a backing format ({quoted(fmt)}), but no file")
            return "", None, 0
        end = f.backing_offset + f.backing_size
        bound = self.cluster_size or len(self.head)
        if end > bound:
            self.reject("name-outside", "the backing file name lies outside the first cluster", 8)
        nbytes = min(f.backing_size, MAX_NAME)
        raw = self.head[f.backing_offset : f.backing_offset + nbytes]
        if len(raw) < nbytes and end <= bound and self.window.seen is None:
            raw = self.window.read(f.backing_offset, nbytes)
        name, nul, hidden = raw.partition(b"\0")
        if nul and hidden.strip(b"\0"):
            self.caution(
                "name-nul", "the backing file name goes on behind a NUL character", f.backing_offset
            )
        if len(raw) < nbytes and self.hidden:
            self._refer("backing", "", fmt, "unseen", at=8)
        elif name:
            self._refer("backing", os.fsdecode(name), fmt, at=f.backing_offset)
        elif f.backing_size:
            self.caution("name-empty", "the backing file name is empty", 8)
        return os.fsdecode(name), fmt, min(end, bound)

    def _check_references(self, backing_name: str, backing_format: str | None) -> None:
        needs_data_file = bool(self.fields.incompat & INCOMPAT_DATA_FILE)
        data_file = self._text(EXT_DATA_FILE)
        if data_file is not None or needs_data_file:
            found = self._extension(EXT_DATA_FILE)
            self._refer("data-file", data_file or "", "raw", at=found[1] if found else 72)
        if data_file is not None and not needs_data_file:
            self.caution(
                "unused-data-file", "an external data file is named, but its feature bit is not set"
            )
        if backing_name and backing_format is None:
            # Without a format a reader guesses, and a guest that writes its raw base decides.
            self.caution("format-missing", "the backing file is named without its format")

    def _refer(self, kind: str, name: str, fmt: str | None, *flags: str, at: int) -> None:
        flags = flags or tuple(_name_flags(name))
        self.references.append(NamedFile(kind, name, fmt, flags))
        what = f"the {SPOKEN[kind]} {quoted(name)}" if name else f"an unnamed {SPOKEN[kind]}"
        why = f" ({', '.join(flags)})" if flags else ""
        bad = {"json", "protocol", "device", "unprintable", "unseen"} & set(flags)
        if not self.allow_references:
            self.reject(kind, f"the image names {what}{why}; references are not allowed", at)
        elif bad:
            self.reject(kind, f"the image names {what}{why}, which is no plain path", at)
        elif flags:
            self.caution(kind, f"the image names {what}{why}", at)
        else:
            self.note(kind, f"the image names {what}", at)

    # ---- Tables ----

    def _bitmaps_claim(self) -> tuple[int, int, int, int] | None:
        """``(count, nbytes, offset, where)`` of the bitmap directory."""
        found = self._extension(EXT_BITMAPS)
        if not found or len(found[0]) != 24 or not self.fields.autoclear & AUTOCLEAR_BITMAPS:
            return None
        count, _, nbytes, offset = struct.unpack(">IIQQ", found[0])
        return count, nbytes, offset, found[1]

    def _claim_tables(self) -> None:
        f = self.fields
        self._claim("L1 table", f.l1_offset, f.l1_size * 8, 40, MAX_L1_BYTES, "limit-l1-table", 36)
        self._claim(
            "refcount table",
            f.rt_offset,
            f.rt_clusters * self.cluster_size,
            48,
            MAX_REFTABLE_BYTES,
            "limit-refcount-table",
            56,
        )
        if f.nb_snapshots <= MAX_SNAPSHOTS:
            self._walk_snapshots()
        crypto = self._extension(EXT_CRYPTO)
        if crypto and len(crypto[0]) == 16:
            offset, nbytes = struct.unpack(">QQ", crypto[0])
            self._claim("LUKS header", offset, nbytes, crypto[1])
        bitmaps = self._bitmaps_claim()
        if bitmaps:
            self._walk_bitmaps(*bitmaps)

    def _claim(
        self,
        name: str,
        offset: int,
        nbytes: int,
        at: int | None,
        limit: int | None = None,
        limit_code: str = "",
        limit_at: int | None = None,
    ) -> bool:
        """Notes a table; False if it cannot be one."""
        if nbytes == 0:
            return True
        if limit is not None and nbytes > limit:
            self.reject(
                limit_code, f"the {name} has {nbytes} bytes; at most {limit} are allowed", limit_at
            )
            return False
        if self.cluster_size and offset % self.cluster_size:
            self.reject("table-misaligned", f"the {name} is not aligned to a cluster", at)
            return False
        if offset < self.cluster_size:
            self.reject("tables-overlap", f"the {name} overlaps the header cluster", at)
            return False
        if offset + nbytes > self.end:
            self.reject("table-beyond-end", f"the {name} lies beyond the end of the file", at)
            return False
        self.tables.append(Table(name, offset, nbytes, at))
        return True

    def _check_tables(self) -> None:
        self.tables.sort(key=lambda table: table.offset)
        for low, high in pairwise(self.tables):
            if low.offset + low.nbytes > high.offset:
                self.reject(
                    "tables-overlap",
                    f"the {low.name} and the {high.name} overlap",
                    high.claimed_at,
                )
                # One is enough: ten thousand would be a way to fill a log.
                return

    def _walk_snapshots(self) -> None:
        f = self.fields
        if not f.nb_snapshots or not self._claim(
            "snapshot table", f.snapshots_offset, f.nb_snapshots * 40, 64
        ):
            return
        data = self.window.read(f.snapshots_offset, SNAPSHOT_BYTES)
        before = len(self.anomalies)
        end = 0
        for index in range(f.nb_snapshots):
            start = end
            if start + 40 > len(data):
                break
            l1_offset, l1_size, id_size, name_size = struct.unpack_from(">QIHH", data, start)
            (extra,) = struct.unpack_from(">I", data, start + 36)
            end = start + (40 + extra + id_size + name_size + 7 & ~7)
            at = f.snapshots_offset + start
            who = f"snapshot {index + 1}"
            if extra > MAX_SNAPSHOT_EXTRA:
                self.reject(
                    "limit-snapshot-extra", f"{who} has {extra} bytes of extra data", at + 36
                )
            if extra >= 16 and start + 56 <= len(data):
                (size,) = struct.unpack_from(">Q", data, start + 48)
                if self.max_virtual_size is not None and size > self.max_virtual_size:
                    self.reject(
                        "limit-virtual-size",
                        f"the disk of {who} has {size} bytes; {self.max_virtual_size} are allowed",
                        at + 48,
                    )
            self._claim(
                f"L1 table of {who}", l1_offset, l1_size * 8, at, MAX_L1_BYTES, "limit-l1-table", at
            )
            if len(self.anomalies) > before:
                return
        if f.snapshots_offset + end > self.end:
            self.reject(
                "table-beyond-end", "the snapshot table lies beyond the end of the file", 64
            )

    def _walk_bitmaps(self, count: int, nbytes: int, offset: int, at: int) -> None:
        if not self._claim(
            "bitmap directory", offset, nbytes, at, 1024 * MAX_BITMAPS, "limit-bitmap-directory", at
        ):
            return
        data = self.window.read(offset, min(nbytes, BITMAP_BYTES))
        before = len(self.anomalies)
        start = 0
        for index in range(count):
            if start + 24 > nbytes:
                self.reject(
                    "bitmap-directory", f"the bitmap directory has no room for {count} bitmaps", at
                )
                return
            if start + 24 > len(data):
                return
            where, entries, _, kind, granularity, name_size, extra = struct.unpack_from(
                ">QIIBBHI", data, start
            )
            name_at = start + 24 + extra
            raw = data[name_at : name_at + name_size]
            name = os.fsdecode(raw)
            if len(raw) == name_size:
                self.bitmaps.append(name)
            here = offset + start
            if kind != 1 or not 9 <= granularity <= 31 or not 0 < name_size <= MAX_NAME or extra:
                self.caution("bitmap-entry", f"bitmap {index + 1} is of an unknown kind", here)
            self._claim(
                f"table of bitmap {index + 1}",
                where,
                entries * 8,
                here,
                MAX_BITMAP_TABLE_BYTES,
                "limit-bitmap-table",
                here,
            )
            if len(self.anomalies) > before:
                return
            start = name_at + name_size + 7 & ~7

    # ---- The mapping ----

    def _sample_mapping(self) -> None:
        """The first entries of L1 and of two L2 tables: bombs and truncated files show there."""
        f = self.fields
        l1 = _entries(self.window.read(f.l1_offset, min(f.l1_size * 8, L1_BYTES)))
        tables = [entry & _OFFSET_MASK for entry in l1 if entry & _OFFSET_MASK]
        if any(entry & _L1_RESERVED for entry in l1):
            self.caution("reserved-bits", "reserved bits are set in the L1 table", f.l1_offset)
        for offset in tables:
            if offset % self.cluster_size or offset < self.cluster_size:
                self.reject("l2-table-misplaced", f"an L2 table at {offset:#x} cannot be one")
                return
            if offset + self.cluster_size > self.end:
                self.reject(
                    "table-beyond-end",
                    f"the L2 table at {offset:#x} lies beyond the end of the file",
                )
                return
        if len(set(tables)) < len(tables):
            self.caution(
                "shared-l2-tables",
                "several L1 entries use the same L2 table: a small file that reads as a large disk",
            )
        for offset in dict.fromkeys(tables[:L2_TABLES]):
            self._sample_l2(offset)

    def _sample_l2(self, table: int) -> None:
        f = self.fields
        entries = _entries(self.window.read(table, min(self.cluster_size, L2_BYTES)))
        if f.incompat & INCOMPAT_EXTL2:
            entries = entries[::2]
        used = list(filter(None, entries))
        compressed = [entry & (_COMPRESSED - 1) for entry in used if entry & _COMPRESSED]
        standard = [entry & _OFFSET_MASK for entry in used if not entry & _COMPRESSED]
        # Clusters that read as zeros may have no place in the file.
        plain = list(filter(None, standard))
        shared = len(compressed) - len(set(compressed))
        if shared:
            self.caution(
                "shared-compressed-clusters",
                f"{shared + 1} or more guest clusters share one compressed stream: a small file "
                "that reads as a large disk",
                table,
            )
        if len(set(plain)) < len(plain):
            self.caution(
                "shared-clusters", "several guest clusters share one cluster of the file", table
            )
        shift = 62 - (f.cluster_bits - 8)
        streams = [entry & ((1 << shift) - 1) for entry in compressed]
        inside = [] if f.incompat & INCOMPAT_DATA_FILE else plain
        if max(inside, default=0) >= self.end or max(streams, default=0) >= self.end:
            self.caution("data-beyond-end", "data lies beyond the end of the file", table)
        if f.compression_type == 1:
            for offset in streams[:ZSTD_FRAMES]:
                self._check_zstd(offset)

    def _check_zstd(self, offset: int) -> None:
        window = zstd_window(self.window.read(offset, 6))
        if window > MAX_ZSTD_WINDOW:
            self.caution(
                "limit-zstd-window",
                f"a compressed cluster asks for a window of {window} bytes to decode "
                f"{self.cluster_size}",
                offset,
            )


def _decode(head: bytes) -> Fields:
    padded = head[:112].ljust(112, b"\0")
    fields = Fields(*_V2.unpack_from(padded, 0))
    if fields.version == 2:
        return fields
    # Of an unknown version nothing but the first words is known; as version 3 it is refused.
    incompat, compat, autoclear, refcount_order, length = _V3.unpack_from(padded, 72)
    return fields._replace(
        incompat=incompat,
        compat=compat,
        autoclear=autoclear,
        refcount_order=refcount_order,
        header_length=length,
        compression_type=padded[104] if length > 104 else 0,
    )


def _entries(data: bytes) -> list[int]:
    table = array("Q", data[: len(data) & ~7])
    if byteorder == "little":
        table.byteswap()
    return table.tolist()


def zstd_window(frame: bytes) -> int:
    """Bytes of window that a zstd frame asks of its decoder; 0 where it names none."""
    if len(frame) < 6 or not frame.startswith(b"\x28\xb5\x2f\xfd") or frame[4] & 0x20:
        return 0
    base = 1 << (10 + (frame[5] >> 3))
    return base + (base >> 3) * (frame[5] & 7)


_DEVICE_FOLDERS = ("/dev/", "/proc/", "/sys/")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def _name_flags(name: str) -> Iterator[str]:
    if not name:
        yield "empty"
        return
    path = name
    if name.startswith("json:"):
        yield "json"
        path = ""
    elif ":" in name.split("/", 1)[0]:
        yield "protocol"
        # A path may hide behind it, as in file:/etc/shadow or host_device:/dev/sda; not in a URL.
        scheme, _, path = name.partition(":")
        if path.startswith("//") and scheme != "file":
            path = ""
    if path.startswith("/"):
        yield "absolute"
        if ("/" + posixpath.normpath(path).lstrip("/") + "/").startswith(_DEVICE_FOLDERS):
            yield "device"
    if ".." in path.split("/"):
        yield "parent"
    if _UNPRINTABLE.search(name):
        yield "unprintable"


def quoted(name: str) -> str:
    """A name out of an image for a sentence: short, and nothing in it can drive a terminal."""
    text = name if len(name) <= 200 else name[:200] + "..."
    return "'" + text.encode("unicode_escape", "surrogatepass").decode("ascii") + "'"
