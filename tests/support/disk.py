"""One disk and all that a guest or its manager can do with it, beside a plain bytearray.

Every operation is a method that says, by its decorator, what it may be called with and when, so that
whoever drives the disk (hypothesis in test_state_machine.py, a seed in campaigns/soak.py) draws from
the same choices.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import qcow2x
from qcow2x.encryption import Encryption
from support.bitmaps import dirty_in_qemu
from support.marked import Marked
from support.qemu import Locked, check_clean, compare_bytes, qemu_img, qemu_io
from support.stamps import explain, noise, stamped

_Method = TypeVar("_Method", bound=Callable[..., None])

KiB = 1 << 10
MiB = 1 << 20

#: Small clusters reach table growth and many slices with few bytes, so most runs use them.
CLUSTER_BITS = [9] * 8 + [10] * 3 + [11, 12, 12, 13, 14, 14, 15, 16, 16, 17, 18, 19, 20, 21]
CACHES = ["unsafe"] * 6 + ["writeback", "none", "writethrough", "directsync"]
GROWTH = ["auto", "auto", "ahead", "together", "plain"]
CIPHERS = [None] * 5 + ["luks", "aes"]
KEY = "the machine's"
GRANULARITIES = [512, 1024, 4096, 64 * KiB]


class Draw(Protocol):
    """Makes the choices."""

    def one_of(self, values: Sequence[Any]) -> Any: ...

    def integer(self, least: int, most: int) -> int: ...


#: A list: one of these. A range: an integer of it. A tuple: of each. A function: what it draws.
Choice = list[Any] | range | tuple[Any, ...] | Callable[[Draw], Any]


def choose(choice: Choice, draw: Draw) -> Any:
    if isinstance(choice, list):
        return draw.one_of(choice)
    if isinstance(choice, range):
        return draw.integer(choice.start, choice.stop - 1)
    if isinstance(choice, tuple):
        return tuple(choose(part, draw) for part in choice)
    return choice(draw)


@dataclass(frozen=True)
class Operation:
    """How a method may be called: with which arguments, and when."""

    choices: dict[str, Choice]
    when: Callable[[Any], Any]

    def draw(self, draw: Draw) -> dict[str, Any]:
        return {name: choose(choice, draw) for name, choice in self.choices.items()}


def operation(
    *, when: Callable[[Any], Any] = lambda self: True, **choices: Choice
) -> Callable[[_Method], _Method]:
    def mark(method: _Method) -> _Method:
        method.operation = Operation(choices, when)  # type: ignore[attr-defined]
        return method

    return mark


def operations() -> dict[str, Operation]:
    """Every operation but the one that begins."""
    found = {name: getattr(method, "operation", None) for name, method in vars(Disk).items()}
    return {name: op for name, op in found.items() if op is not None and name != "begin"}


@dataclass(frozen=True)
class Shape:
    """The options of one image."""

    cluster_bits: int
    refcount_bits: int
    compat: str
    extended_l2: bool
    compression: str
    lazy: bool

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def options(self) -> dict[str, object]:
        if self.compat == "0.10":
            return {"cluster_size": self.cluster_size, "compat": "0.10"}
        return {
            "cluster_size": self.cluster_size,
            "refcount_bits": self.refcount_bits,
            "extended_l2": self.extended_l2,
            "compression_type": self.compression,
            "lazy_refcounts": self.lazy,
        }


def shape_of(draw: Draw) -> Shape:
    cluster_bits = draw.one_of(CLUSTER_BITS)
    return Shape(
        cluster_bits=cluster_bits,
        refcount_bits=draw.one_of([16, 1, 2, 4, 8, 32, 64]),
        compat=draw.one_of(["1.1", "1.1", "1.1", "0.10"]),
        extended_l2=cluster_bits >= 14 and draw.one_of([False, True]),
        compression=draw.one_of(["zlib", "zstd"]),
        lazy=draw.one_of([False, False, True]),
    )


def span(cluster_size: int) -> int:
    """Bytes of disk to play on: many clusters of a small size, a few of a large one."""
    return max(256 * KiB, 3 * cluster_size)


#: Where and how much, as fractions that the machine scales to the disk it has.
PLACES = (
    range(1 << 20),
    ["byte", "sector", "cluster"],
    range(1 << 20),
    ["sector", "clusters", "many"],
)


class Disk:
    """The topmost layer is open for writing; ``model`` is what its guest sees."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="qcow2x-machine-"))
        self.image: qcow2x.Image | None = None
        self.model = bytearray()
        self.sequence = 0
        self.layers: list[tuple[Path, str, bytes]] = []
        self.patterns: list[tuple[int, int, int]] = []
        self.held: dict[str, bytes] = {}
        self.external = False
        self.cipher: str | None = None
        #: The layers that are encrypted.
        self.encrypted: list[Path] = []
        self.marked: dict[str, Marked] = {}

    # ---- The image and what lies under it ----

    @operation(
        shape=shape_of,
        base=["none", "none", "raw", "qcow2", "qemu"],
        size=range(1, (1 << 20) + 1),
        base_size=["same", "shorter", "longer"],
        base_shape=shape_of,
        cache=CACHES,
        data_file=[None] * 5 + ["cooked", "raw"],
        cipher=CIPHERS,
        growth=GROWTH,
    )
    def begin(
        self,
        shape: Shape,
        base: str,
        size: int,
        base_size: str,
        base_shape: Shape,
        cache: str,
        data_file: str | None,
        cipher: str | None,
        growth: str,
    ) -> None:
        self.shape = shape
        nbytes = max(512, span(shape.cluster_size) * size >> 20 & ~511)
        if base != "none":
            self._make_base(base, base_shape, self._other_size(nbytes, base_size))
        self._make_top(shape, nbytes, cache, growth, data_file, cipher)

    def _other_size(self, nbytes: int, relation: str) -> int:
        if relation == "shorter":
            return max(512, nbytes * 2 // 3 & ~511)
        return nbytes + (nbytes // 2 & ~511) if relation == "longer" else nbytes

    def _make_base(self, kind: str, shape: Shape, nbytes: int) -> None:
        raw = self.folder / "base.raw"
        content = bytearray(nbytes)
        # Holes in it, so that a backing file's own zeros take part.
        third = nbytes // 3
        content[:third] = stamped(0, third, 1)
        content[2 * third :] = stamped(2 * third, nbytes - 2 * third, 1)
        raw.write_bytes(content)
        self.model = content
        if kind == "raw":
            self._push(raw, "raw")
            return
        path = self.folder / "base.qcow2"
        if kind == "qemu":
            options = ",".join(
                f"{key}={str(value).lower() if isinstance(value, bool) else value}"
                for key, value in shape.options.items()
            )
            flags = ["-c"] if self.sequence % 2 else []
            qemu_img("convert", *flags, "-O", "qcow2", "-o", options, raw, path)
        else:
            qcow2x.create(path, nbytes, **shape.options)  # type: ignore[arg-type]
            with qcow2x.open(path, "r+", cache="unsafe") as image:
                image.pwrite(content[:third], 0)
                image.pwrite(content[2 * third :], 2 * third)
        self._push(path, "qcow2")

    def _push(self, path: Path, fmt: str) -> None:
        self.layers.append((path, fmt, hashlib.sha256(path.read_bytes()).digest()))

    def _make_top(
        self,
        shape: Shape,
        nbytes: int,
        cache: str,
        growth: str,
        data_file: str | None,
        cipher: str | None,
    ) -> None:
        self.shape = shape
        self.held = {}
        self.marked = {}
        raw = data_file == "raw" and not self.layers
        self.external = data_file is not None and shape.compat != "0.10"
        self.path = self.folder / f"layer{len(self.layers)}.qcow2"
        options = dict(shape.options)
        if self.layers:
            options |= {
                "backing_file": self.layers[-1][0].name,
                "backing_format": self.layers[-1][1],
            }
        if self.external:
            options |= {"data_file": self.path.with_suffix(".data"), "data_file_raw": raw}
        self.cipher = None if self.external else cipher
        if self.cipher is not None:
            self.encrypted.append(self.path)
            options["encryption"] = Encryption(key=KEY, format=self.cipher, iter_time_ms=1)
        qcow2x.create(self.path, nbytes, **options)  # type: ignore[arg-type]
        self._set_length(nbytes)
        self._open(cache, growth=growth)

    def _set_length(self, nbytes: int) -> None:
        del self.model[nbytes:]
        self.model.extend(bytes(nbytes - len(self.model)))
        self.patterns = [p for p in self.patterns if p[0] + p[1] <= nbytes]

    def _open(self, cache: str, l2_cache_size: int | None = None, growth: str = "auto") -> None:
        self.image = qcow2x.open(
            self.path,
            "r+",
            references="follow",
            cache=cache,
            l2_cache_size=l2_cache_size,
            growth=growth,
            key=self._key(),
        )

    def _key(self) -> dict[str, str]:
        """The key of every layer that is encrypted."""
        return dict.fromkeys([str(self.path), *(str(path) for path, _, _ in self.layers)], KEY)

    def _range(self, place: tuple[int, str, int, str]) -> tuple[int, int]:
        """A range of at least one byte inside the disk."""
        where, align, much, scale = place
        size = len(self.model)
        offset = size * where >> 20
        offset -= offset % {"byte": 1, "sector": 512, "cluster": self.shape.cluster_size}[align]
        most = {
            "sector": 1024,
            "clusters": 3 * self.shape.cluster_size,
            "many": max(64 * KiB, 2 * self.shape.cluster_size),
        }[scale]
        length = 1 + (most * much >> 20)
        if align != "byte" and much & 1:
            length = -(-length // 512) * 512
        if align == "cluster" and much & 2:
            length = -(-length // self.shape.cluster_size) * self.shape.cluster_size
        return offset, min(length, size - offset)

    def _note(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        for bitmap in self.marked.values():
            bitmap.note(offset, len(data))

    def _zeroed(self, offset: int, length: int) -> None:
        """Bitmaps tell of what is no longer what it was; of zeros that stayed zeros they may."""
        for bitmap in self.marked.values():
            bitmap.note(offset, length, whole=False)
            step = bitmap.granularity
            for granule in range(offset // step * step, offset + length, step):
                start, end = max(offset, granule), min(offset + length, granule + step)
                if any(self.model[start:end]):
                    bitmap.note(start, end - start)
        self.model[offset : offset + length] = bytes(length)

    def _changed(self, offset: int, length: int) -> None:
        self.patterns = [
            p for p in self.patterns if p[0] + p[1] <= offset or offset + length <= p[0]
        ]

    def _clusters_in(self, offset: int, length: int) -> tuple[int, int]:
        """The whole clusters of a range, the disk's end completing one, as bytes."""
        size = self.shape.cluster_size
        end = offset + length
        first = -(-offset // size) * size
        last = end if end == len(self.model) else end // size * size
        return first, max(first, last)

    # ---- What a guest does ----

    @operation(place=PLACES, fua=[False] * 7 + [True], noisy=[False, True])
    def write(self, place: tuple[int, str, int, str], fua: bool, noisy: bool) -> None:
        offset, length = self._range(place)
        self.sequence += 1
        data = (noise if noisy else stamped)(offset, length, self.sequence + 1)
        assert self.image.pwrite(data, offset, fua=fua) == length
        self._note(offset, data)
        self._changed(offset, length)

    @operation(first=PLACES, second=PLACES, third=PLACES, fua=[False] * 7 + [True])
    def write_many(
        self,
        first: tuple[int, str, int, str],
        second: tuple[int, str, int, str],
        third: tuple[int, str, int, str],
        fua: bool,
    ) -> None:
        """In one call, what does not overlap."""
        requests: list[tuple[bytes, int]] = []
        for place in (first, second, third):
            offset, length = self._range(place)
            self.sequence += 1
            data = stamped(offset, length, self.sequence + 1)
            if all(at + len(had) <= offset or offset + length <= at for had, at in requests):
                requests.append((data, offset))
        lengths = [len(data) for data, _ in requests]
        assert self.image.pwritev_many(requests, fua=fua) == lengths
        for data, offset in requests:
            self._note(offset, data)
            self._changed(offset, len(data))

    @operation(place=PLACES, byte=range(256))
    def fill(self, place: tuple[int, str, int, str], byte: int) -> None:
        offset, length = self._range(place)
        self.image.pwrite(bytes([byte]) * length, offset)
        self._note(offset, bytes([byte]) * length)
        self._changed(offset, length)
        self.patterns.append((offset, length, byte))

    @operation(
        when=lambda self: not self.external and self.cipher is None,
        place=PLACES,
        noisy=[False, False, True],
    )
    def write_compressed(self, place: tuple[int, str, int, str], noisy: bool) -> None:
        size = self.shape.cluster_size
        offset, length = self._range(place)
        offset -= offset % size
        length = min(-(-length // size) * size, len(self.model) - offset)
        self.sequence += 1
        data = (noise if noisy else stamped)(offset, length, self.sequence + 1)
        assert self.image.pwrite_compressed(data, offset) == length
        self._note(offset, data)
        self._changed(offset, length)

    @operation(place=PLACES)
    def discard(self, place: tuple[int, str, int, str]) -> None:
        offset, length = self._range(place)
        self._discarded(offset, length)
        self._changed(offset, length)

    def _discarded(self, offset: int, length: int) -> None:
        self.image.discard(offset, length)
        for bitmap in self.marked.values():
            bitmap.note(offset, length, whole=False)
        if self.shape.compat == "0.10" and self.layers:
            return
        first, last = self._clusters_in(offset, length)
        self._note(first, bytes(last - first))

    @operation(place=PLACES, unmap=[False, True])
    def write_zeroes(self, place: tuple[int, str, int, str], unmap: bool) -> None:
        offset, length = self._range(place)
        self.image.write_zeroes(offset, length, unmap=unmap)
        self._zeroed(offset, length)
        self._changed(offset, length)
        self.patterns.append((offset, length, 0))

    @operation()
    def flush(self) -> None:
        self.image.flush()

    @operation(
        cache=CACHES,
        l2_cache_size=[None, None, 1, 64 * KiB],
        growth=GROWTH,
    )
    def reopen(self, cache: str, l2_cache_size: int | None, growth: str) -> None:
        self.image.close()
        self._open(cache, l2_cache_size, growth)

    @operation(
        size=range(1, (1 << 20) + 1),
        near=[None, None, -512, 512, 4096],
        preallocation=["off"] * 4 + ["metadata", "falloc", "full"],
    )
    def resize(self, size: int, near: int | None, preallocation: str) -> None:
        if near is not None:
            nbytes = max(512, len(self.model) + near)
        else:
            nbytes = max(512, 2 * span(self.shape.cluster_size) * size >> 20 & ~511)
        if self.held and self.shape.compat == "0.10":
            with contextlib.suppress(qcow2x.UnsupportedFeature):
                self.image.resize(nbytes, shrink=True)
                raise AssertionError("version 2 has no place for the size that a snapshot had")
            return
        if self.marked and nbytes < len(self.model):
            with contextlib.suppress(qcow2x.UnsupportedFeature):
                self.image.resize(nbytes, shrink=True)
                raise AssertionError("a disk with bitmaps cannot shrink")
            return
        how = preallocation if nbytes > len(self.model) else "off"
        if how != "off" and self.cipher is not None and self.shape.compat == "0.10":
            with contextlib.suppress(qcow2x.UnsupportedFeature):
                self.image.resize(nbytes, preallocation=how)
                raise AssertionError("version 2 has no mark for zeros that are not deciphered")
            return
        self.image.resize(nbytes, shrink=True, preallocation=how)
        for bitmap in self.marked.values():
            bitmap.clip(len(self.model))
        self._set_length(nbytes)
        assert self.image.size == nbytes

    @operation(
        when=lambda self: len(self.layers) < 4,
        shape=shape_of,
        same_shape=[False, True],
        size=["same", "same", "shorter", "longer"],
        cache=CACHES,
        data_file=[None] * 5 + ["cooked"],
        cipher=CIPHERS,
        growth=GROWTH,
    )
    def overlay(
        self,
        shape: Shape,
        same_shape: bool,
        size: str,
        cache: str,
        data_file: str | None,
        cipher: str | None,
        growth: str,
    ) -> None:
        self.image.close()
        self._push(self.path, "qcow2")
        nbytes = self._other_size(len(self.model), size)
        shape = self.shape if same_shape else shape
        self._make_top(shape, nbytes, cache, growth, data_file, cipher)

    @operation(
        what=["version", "width", "lazy"],
        bits=[1, 2, 4, 8, 16, 32, 64],
    )
    def amend(self, what: str, bits: int) -> None:
        """Refused, with nothing changed, where the other version or width cannot say all of it."""
        old = self.shape.compat == "0.10"
        with contextlib.suppress(qcow2x.UnsupportedFeature):
            if what == "version":
                qcow2x.amend(self.image, compat="1.1" if old else "0.10", refcount_bits=16)
                plain = {"refcount_bits": 16, "extended_l2": False, "compression": "zlib"}
                self.shape = replace(
                    self.shape, compat="1.1" if old else "0.10", lazy=False, **plain
                )
            elif old:
                # Version 2 has no choice.
                return
            elif what == "width":
                qcow2x.amend(self.image, refcount_bits=bits)
                self.shape = replace(self.shape, refcount_bits=bits)
            else:
                qcow2x.amend(self.image, lazy_refcounts=not self.shape.lazy)
                self.shape = replace(self.shape, lazy=not self.shape.lazy)

    # ---- Many at once ----

    @operation(threads=range(2, 7), rounds=range(1, 13), seed=range(1 << 20))
    def together(self, threads: int, rounds: int, seed: int) -> None:
        """Threads that each have stripes of the disk, which begin and end inside of clusters."""
        self.sequence += 1
        stripe = max(512, self.shape.cluster_size // 2 + 512 & ~511)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                self._work(random.Random(seed * 8 + number), number, threads, stripe, rounds)
            except BaseException as exc:
                failures.append(exc)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.patterns = []
        if failures:
            raise failures[0]

    def _work(
        self, rng: random.Random, number: int, threads: int, stripe: int, rounds: int
    ) -> None:
        size = len(self.model)
        starts = range(number * stripe, size, threads * stripe)
        for _ in range(rounds if starts else 0):
            start = rng.choice(starts)
            end = min(start + stripe, size)
            offset = rng.randrange(start, end)
            length = rng.randint(1, end - offset)
            match rng.randrange(9):
                case 8:
                    self._discarded(offset, length)
                case 0 | 1 | 2:
                    data = stamped(offset, length, number << 32 | self.sequence)
                    self.image.pwrite(data, offset)
                    self._note(offset, data)
                case 3:
                    self.image.write_zeroes(offset, length, unmap=rng.random() < 0.5)
                    self._zeroed(offset, length)
                case 4:
                    self.image.flush()
                case 5:
                    list(self.image.extents(offset, length))
                case _:
                    got = self.image.pread(end - start, start)
                    self._same(start, got, self.model[start:end])

    # ---- Snapshots ----

    @operation(when=lambda self: not self.external and len(self.held) < 3)
    def snapshot(self) -> None:
        # Narrow refcounts run out of references; then nothing has changed.
        with contextlib.suppress(qcow2x.UnsupportedFeature):
            made = self.image.snapshots.create(f"at {self.sequence}")
            self.held[made.id] = bytes(self.model)

    @operation(when=lambda self: self.held, which=range(3))
    def apply_snapshot(self, which: int) -> None:
        key = sorted(self.held)[which % len(self.held)]
        before = bytes(self.model)
        # Narrow refcounts run out of references. The bitmaps were told before; they may tell too much.
        with contextlib.suppress(qcow2x.UnsupportedFeature):
            self.image.snapshots.apply(key)
            self.model[:] = self.held[key]
            self.patterns = []
        self._applied(before)

    @operation(when=lambda self: self.held, which=range(3))
    def delete_snapshot(self, which: int) -> None:
        key = sorted(self.held)[which % len(self.held)]
        self.image.snapshots.delete(key)
        del self.held[key]

    @operation(when=lambda self: self.held, which=range(3))
    def read_snapshot(self, which: int) -> None:
        key = sorted(self.held)[which % len(self.held)]
        with self.image.snapshots.open(key) as then:
            self._same(0, then.pread(len(self.held[key]) + 1, 0), self.held[key])

    def _applied(self, before: bytes) -> None:
        """The bitmaps tell of what differs; of what is stored elsewhere with the same bytes they may."""
        size = len(self.model)
        for bitmap in self.marked.values():
            bitmap.note(0, size, whole=False)
            for at in range(0, size, bitmap.granularity):
                if before[at : at + bitmap.granularity] != self.model[at : at + bitmap.granularity]:
                    bitmap.note(at, min(bitmap.granularity, size - at))

    # ---- Bitmaps ----

    @operation(
        when=lambda self: self.shape.compat != "0.10" and len(self.marked) < 3,
        granularity=GRANULARITIES,
        enabled=[True, True, False],
    )
    def add_bitmap(self, granularity: int, enabled: bool) -> None:
        name = f"bitmap {self.sequence}"
        if name not in self.marked:
            self.image.bitmaps.add(name, granularity, enabled)
            self.marked[name] = Marked(granularity, enabled)

    @operation(
        when=lambda self: self.marked, which=range(3), verb=["clear", "enable", "disable", "remove"]
    )
    def change_bitmap(self, which: int, verb: str) -> None:
        name = sorted(self.marked)[which % len(self.marked)]
        getattr(self.image.bitmaps, verb)(name)
        if verb == "remove":
            del self.marked[name]
        elif verb == "clear":
            self.marked[name].clear()
        else:
            self.marked[name].enabled = verb == "enable"

    @operation(when=lambda self: len(self.marked) > 1, which=range(3))
    def merge_bitmaps(self, which: int) -> None:
        target, *sources = (
            sorted(self.marked)[which % len(self.marked) :] + sorted(self.marked)[:which]
        )
        self.image.bitmaps.merge(target, sources)
        for source in sources:
            if source != target:
                self.marked[target].merge(self.marked[source])

    @operation(when=lambda self: self.marked)
    def read_bitmaps(self) -> None:
        self._bitmaps_agree(self.image)

    def _bitmaps_agree(self, image: qcow2x.Image) -> None:
        assert sorted(image.bitmaps) == sorted(self.marked)
        for name, bitmap in self.marked.items():
            dirty = [(e.offset, e.length) for e in image.bitmaps.extents(name) if e.dirty]
            assert bitmap.agrees(dirty, len(self.model)), f"{name}: {bitmap.explain(dirty)}"
            assert image.bitmaps[name].enabled == bitmap.enabled

    # ---- What it sees ----

    @operation(place=PLACES)
    def read(self, place: tuple[int, str, int, str]) -> None:
        offset, length = self._range(place)
        wanted = self.model[offset : offset + length]
        self._same(offset, self.image.pread(length, offset), wanted)
        # Past the end of the disk there is nothing.
        buffer = bytearray(b"\xaa" * (length + 700))
        n = self.image.preadinto(buffer, offset)
        assert n == min(length + 700, len(self.model) - offset)
        self._same(offset, bytes(buffer[:n]), self.model[offset : offset + n])
        assert buffer[n:] == b"\xaa" * (len(buffer) - n)

    @operation()
    def read_all(self) -> None:
        self._same(0, self.image.pread(len(self.model), 0), self.model)

    @operation(place=PLACES)
    def extents(self, place: tuple[int, str, int, str]) -> None:
        offset, length = self._range(place)
        at = offset
        for extent in self.image.extents(offset, length):
            assert extent.offset == at
            assert extent.length > 0
            assert extent.data != extent.zero
            assert extent.depth <= len(self.layers)
            if extent.zero:
                assert not any(self.model[at : at + extent.length]), extent
            at += extent.length
        assert at == offset + length

    @operation()
    def check(self) -> None:
        found = self.image.check()
        assert found.clean, found.findings

    def _same(self, offset: int, got: bytes, wanted: bytes | bytearray) -> None:
        if got != wanted:
            raise AssertionError(explain(offset, got, wanted))

    def memory_is_bounded(self) -> None:
        if self.image is not None:
            stats = self.image.stats()
            assert stats.l2_cache_bytes <= stats.l2_cache_limit

    # ---- The end of a run ----

    def end(self) -> None:
        try:
            if self.image is not None:
                self._same(0, self.image.pread(len(self.model), 0), self.model)
                self.image.close()
                self._judge()
        finally:
            self.image = None
            gc.collect(0)
            shutil.rmtree(self.folder)

    def _judge(self) -> None:
        self._qemu_agrees()
        with qcow2x.open(self.path, references="follow", key=self._key()) as image:
            assert image.check().clean
            self._bitmaps_agree(image)
        for key, content in self.held.items():
            with qcow2x.open(self.path, references="follow", snapshot=key, key=self._key()) as then:
                self._same(0, then.pread(len(content) + 1, 0), content)
        for path, _, digest in self.layers:
            assert hashlib.sha256(path.read_bytes()).digest() == digest, f"{path} was changed"

    def _qemu_agrees(self) -> None:
        """Every layer is clean, and what the topmost shows is the model."""
        chain = [path for path, fmt, _ in self.layers if fmt == "qcow2"] + [self.path]
        encrypted = [path in self.encrypted for path in reversed(chain)]
        for n, path in enumerate(reversed(chain)):
            depths = [depth for depth, secret in enumerate(encrypted[n:]) if secret]
            if depths:
                locked = Locked(path, depths, KEY)
                locked.check_clean()
                if path == self.path:
                    locked.compare(self.model)
                continue
            check_clean(path)
            if path == self.path:
                compare_bytes(path, self.model)
                self._sample()

    def _sample(self) -> None:
        """What is slow to ask."""
        if self.patterns and self.sequence % 4 == 0:
            reads = [f"read -P {byte} {offset} {n}" for offset, n, byte in self.patterns[-3:]]
            qemu_io(self.path, *reads)
        if self.marked and self.sequence % 8 == 0:
            name, bitmap = next(iter(self.marked.items()))
            if bitmap.enabled:
                assert bitmap.agrees(dirty_in_qemu(self.path, name), len(self.model))
