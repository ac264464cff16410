"""Changes to an image where they matter: in the fields and tables of the format."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_FORMAT = Path(__file__).resolve().parents[3] / "include" / "qcow2x" / "format.h"
#: Name: offset, of every field of the header.
_OFFSETS = {
    name: int(offset)
    for name, offset in re.findall(r"#define Q2_HDR_(\w+) (\d+)", _FORMAT.read_text())
    if "LENGTH" not in name or name == "HEADER_LENGTH"
}
_WIDE = {
    "BACKING_OFFSET", "SIZE", "L1_OFFSET", "RT_OFFSET", "SNAPSHOTS_OFFSET", "INCOMPAT", "COMPAT",
    "AUTOCLEAR",
}  # fmt: skip
_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_LARGEST = 4 << 20
_BITMAPS, _CRYPTO = 0x23852875, 0x0537BE77
#: Offset and width of what a LUKS header has ahead of its slots, and of what is in each of eight;
#: but for the numbers of iterations, as a run would do nothing but compute keys.
_LUKS_FIELDS = ((0, 4), (6, 2), (8, 8), (40, 8), (72, 8), (104, 4), (108, 4))
_SLOT_FIELDS = ((0, 4), (40, 4), (44, 4))


class Field(NamedTuple):
    offset: int
    width: int


class Layout:
    """Where things are, as far as the image can be followed."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.bits = self.at(_OFFSETS["CLUSTER_BITS"], 4)
        if not 9 <= self.bits <= 21:
            self.bits = 12
        self.cluster = 1 << self.bits
        #: Groups of fields; each group is chosen as often as any other.
        self.groups = [group for group in self._groups() if group]

    def at(self, offset: int, width: int) -> int:
        return int.from_bytes(self.data[offset : offset + width], "big")

    def _fits(self, fields: Sequence[tuple[int, int]]) -> list[Field]:
        end = len(self.data)
        return [Field(at, width) for at, width in fields if 0 <= at and at + width <= end]

    def _words(self, offset: int, count: int) -> list[Field]:
        return self._fits([(offset + 8 * n, 8) for n in range(min(count, 512))])

    def _groups(self) -> Iterator[list[Field]]:
        header = {n: Field(at, 8 if n in _WIDE else 4) for n, at in _OFFSETS.items()}
        yield self._fits(list(header.values()))
        value = {name: self.at(*field) for name, field in header.items()}
        yield from self._extensions(value["HEADER_LENGTH"])
        l1 = value["L1_OFFSET"]
        yield from self._mapping(l1, value["L1_SIZE"])
        table = self._words(value["RT_OFFSET"], 8)
        yield table
        for entry in table[:2]:
            block = self.at(*entry) & ~511
            if block:
                yield self._words(block, 16)
        yield from self._snapshots(value["SNAPSHOTS_OFFSET"], min(value["NB_SNAPSHOTS"], 8))

    def _mapping(self, l1: int, size: int) -> Iterator[list[Field]]:
        entries = self._words(l1, min(size, 64))
        yield entries
        for entry in entries[:4]:
            l2 = self.at(*entry) & _OFFSET_MASK
            words = self._words(l2, self.cluster // 8) if l2 else []
            # Zeros are seldom looked at twice.
            yield [word for word in words if self.at(*word)] + words[:4]
            yield from self._streams(words)

    def _streams(self, words: list[Field]) -> Iterator[list[Field]]:
        shift = 62 - (self.bits - 8)
        for word in words:
            entry = self.at(*word)
            if entry >> 62 == 1:
                at = entry & (1 << shift) - 1
                yield self._fits([(at + n, 1) for n in range(24)])

    def _extensions(self, at: int) -> Iterator[list[Field]]:
        heads = []
        for _ in range(16):
            if at + 8 > len(self.data):
                break
            kind, length = self.at(at, 4), self.at(at + 4, 4)
            heads += [(at, 4), (at + 4, 4)]
            if kind == _BITMAPS:
                yield self._fits([(at + 8, 4), (at + 12, 4), (at + 16, 8), (at + 24, 8)])
                yield from self._bitmaps(self.at(at + 24, 8))
            if kind == _CRYPTO:
                yield self._fits([(at + 8, 8), (at + 16, 8)])
                yield from self._luks(self.at(at + 8, 8))
            if kind == 0 or length > self.cluster:
                break
            at += 8 + (length + 7 & ~7)
        yield self._fits(heads)

    def _bitmaps(self, at: int) -> Iterator[list[Field]]:
        for _ in range(4):
            yield self._fits(
                [(at, 8), (at + 8, 4), (at + 12, 4), (at + 16, 1), (at + 17, 1), (at + 18, 2),
                 (at + 20, 4), (at + 24, 1)]
            )  # fmt: skip
            yield self._words(self.at(at, 8), min(self.at(at + 8, 4), 8))
            name, extra = self.at(at + 18, 2), self.at(at + 20, 4)
            at += (24 + name + extra + 7) & ~7
            if at >= len(self.data):
                return

    def _luks(self, at: int) -> Iterator[list[Field]]:
        yield self._fits([(at + offset, width) for offset, width in _LUKS_FIELDS])
        slots = [(at + 208 + 48 * n + offset, w) for n in range(2) for offset, w in _SLOT_FIELDS]
        yield self._fits(slots)

    def _snapshots(self, at: int, count: int) -> Iterator[list[Field]]:
        for _ in range(count):
            if at + 40 > len(self.data):
                return
            extra = min(self.at(at + 36, 4), 64)
            yield self._fits(
                [(at, 8), (at + 8, 4), (at + 12, 2), (at + 14, 2), (at + 16, 8), (at + 24, 8),
                 (at + 32, 4), (at + 36, 4), *((at + 40 + 8 * n, 8) for n in range(extra // 8))]
            )  # fmt: skip
            yield from self._mapping(self.at(at, 8), min(self.at(at + 8, 4), 4))
            names = self.at(at + 12, 2) + self.at(at + 14, 2)
            at += (40 + extra + names + 7) & ~7


_INTERESTING = (
    0, 1, 2, 7, 8, 9, 21, 22, 31, 32, 63, 64, 72, 104, 112, 127, 128, 255, 256, 511, 512, 513, 1023,
    1024, 4095, 4096, 65535, 65536, 1 << 20, (1 << 21) - 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
    1 << 32, 1 << 40, 1 << 55, 1 << 56, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip


def mutate(
    data: bytes, others: Sequence[bytes], operands: Sequence[int], rng: random.Random
) -> bytes:
    """A changed copy; ``others`` are what may be joined to it, ``operands`` numbers that the core
    compares something with."""
    layout = Layout(data)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        what = rng.randrange(20)
        if what < 15 and layout.groups:
            _field(out, layout, operands, rng)
        elif what < 17:
            _bytes(out, rng)
        elif what < 18:
            _clusters(out, layout.cluster, rng.choice(others) if rng.random() < 0.3 else out, rng)
        elif what < 19:
            _length(out, layout.cluster, rng)
        else:
            fields = rng.choice(layout.groups) if layout.groups else [Field(0, 4)]
            source, target = rng.choice(fields), rng.choice(rng.choice(layout.groups or [fields]))
            value = out[source.offset : source.offset + target.width]
            if target.offset + len(value) <= len(out):
                out[target.offset : target.offset + len(value)] = value
    return bytes(out[:_LARGEST])


def _field(out: bytearray, layout: Layout, operands: Sequence[int], rng: random.Random) -> None:
    at, width = rng.choice(rng.choice(layout.groups))
    if at + width > len(out):
        return
    old = int.from_bytes(out[at : at + width], "big")
    clusters = len(out) // layout.cluster + 2
    flags = old & ~_OFFSET_MASK if width == 8 else 0
    match rng.randrange(9):
        case 0:
            new = rng.choice(_INTERESTING)
        case 1 | 2:
            new = old ^ 1 << rng.randrange(8 * width)
        case 3:
            new = old + rng.choice((-1, 1, 8, -8, 512, -512, layout.cluster, -layout.cluster))
        case 4 | 5:
            # Another cluster, with the flags as they are.
            new = rng.randrange(clusters) * layout.cluster | flags
        case 6:
            new = rng.choice(operands) + rng.choice((0, 0, 1, -1)) if operands else 0
        case 7:
            new = rng.getrandbits(8 * width)
        case _:
            new = old ^ rng.choice((1, 1 << 62, 1 << 63, 3 << 62, 1 << 56, 0xFFFFFFFF))
    out[at : at + width] = (new & (1 << 8 * width) - 1).to_bytes(width, "big")


def _bytes(out: bytearray, rng: random.Random) -> None:
    if out:
        at = rng.randrange(len(out))
        fresh = rng.choice((b"\0", b"\xff", bytes(8), b"\xff" * 8, rng.randbytes(4)))
        out[at : at + len(fresh)] = fresh


def _clusters(out: bytearray, size: int, source: bytes | bytearray, rng: random.Random) -> None:
    """One cluster, or a few, over others."""
    count = rng.choice((1, 1, 2, 4))
    start = rng.randrange(len(source) // size + 1) * size
    piece = bytes(source[start : start + count * size])
    at = rng.randrange(len(out) // size + 1) * size
    out[at : at + len(piece)] = piece


def _length(out: bytearray, size: int, rng: random.Random) -> None:
    if rng.random() < 0.5:
        del out[rng.randrange(len(out) + 1) :]
    else:
        out.extend(bytes(rng.choice((1, 512, size - 1, size, 5 * size))))
