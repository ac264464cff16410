"""What was measured: rows of times, ratios out of them, and the bounds that they are held to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

OURS = "qcow2x"
KIB, MIB = 1 << 10, 1 << 20


@dataclass
class Round:
    """Who took how many seconds, ours under "qcow2x"."""

    seconds: dict[str, float]
    #: By baseline, of work in which one stretch is like the other: our time and its for each stretch in
    #: which both took their turns. What grows is not such work: some of it pays for the rest.
    stretches: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, baseline: str, pairs: list[tuple[float, float]], *, alike: bool) -> Round:
        ours, theirs = (sum(seconds) for seconds in zip(*pairs, strict=True))
        return cls({OURS: ours, baseline: theirs}, {baseline: pairs} if alike else {})


@dataclass
class Row:
    """One kind of work, and how its rounds went."""

    name: str
    requests: int
    rounds: list[Round]
    #: What the bounds know it by: work, nbytes, pattern, cache, depth, temperature ...
    tags: Mapping[str, object]
    #: The most that ours may take, in times of a baseline: bounds besides those of MUST.
    at_most: Mapping[str, float] = field(default_factory=dict)

    def ratios(self, baseline: str) -> list[float]:
        """Our time over the baseline's, round by round."""
        ratios = []
        for one in self.rounds:
            pairs = one.stretches.get(baseline, [(one.seconds[OURS], one.seconds[baseline])])
            ours, theirs = (sum(seconds) for seconds in zip(*pairs, strict=True))
            ratios.append(ours / theirs)
        return ratios

    def measured(self, baseline: str) -> list[float]:
        """The ratios of all stretches where they are alike, else of the rounds.

        Two stretches at a time: who was first in one is second in the other. Who is second finds the pages
        in the CPU's cache, a tenth faster at 4 KiB; the median over single stretches, half of them
        that much above 1 and half below, is anything in between.
        """
        pairs = [pair for one in self.rounds for pair in one.stretches.get(baseline, ())]
        return [
            (ours_first + ours_second) / (theirs_second + theirs_first)
            for (ours_first, theirs_second), (ours_second, theirs_first) in zip(
                pairs[::2], pairs[1::2], strict=False
            )
        ] or self.ratios(baseline)

    def ratio(self, baseline: str) -> float:
        return statistics.median(self.measured(baseline))

    def uncertainty(self, baseline: str) -> float:
        """How far the ratio may be off, at 95 %: half of the span of the order statistics that have the
        median between them."""
        ratios = sorted(self.measured(baseline))
        reach = 0.98 * math.sqrt(len(ratios))
        low = max(0, math.floor(len(ratios) / 2 - reach))
        high = min(len(ratios) - 1, math.ceil(len(ratios) / 2 + reach))
        return (ratios[high] - ratios[low]) / 2

    def spread(self, baseline: str) -> str:
        ratios = self.ratios(baseline)
        return f"{min(ratios):.2f}-{max(ratios):.2f}"

    def baselines(self) -> list[str]:
        return [who for who in self.rounds[0].seconds if who != OURS]

    def microseconds(self, who: str) -> float:
        return statistics.median(one.seconds[who] for one in self.rounds) / self.requests * 1e6


@dataclass
class Fact:
    """A figure with a bound instead of a baseline; ``holds`` is None where it is told for comparison."""

    name: str
    value: str
    bound: str
    holds: bool | None


@dataclass
class Verdict:
    """How one line of MUST came out; ``ratio`` is None if nothing of it was measured."""

    must: Must
    ratio: float | None
    worst: str
    rows: int

    @property
    def holds(self) -> bool:
        return self.ratio is not None and self.ratio <= self.must.at_most

    def said(self) -> str:
        return "not measured" if self.ratio is None else "holds" if self.holds else "misses"


@dataclass(frozen=True)
class Must:
    """What has to be reached: the worst of all rows that *takes* says yes to, as ``combine`` says."""

    work: str
    baseline: str
    at_most: float
    takes: Callable[[Mapping[str, object]], bool]
    combine: Callable[[list[float]], float] = max

    def verdict(self, rows: list[Row]) -> Verdict:
        found = [row for row in rows if self.baseline in row.baselines() and self.takes(row.tags)]
        if not found:
            return Verdict(self, None, "", 0)
        by_row = {row.name: row.ratio(self.baseline) for row in found}
        worst = max(by_row, key=lambda name: by_row[name])
        return Verdict(self, self.combine(list(by_row.values())), worst, len(found))


def tagged(**wanted: object) -> Callable[[Mapping[str, object]], bool]:
    """Whether a row has these tags; a tuple lists what may stand there."""

    def takes(tags: Mapping[str, object]) -> bool:
        return all(
            tags.get(name) in value if isinstance(value, tuple) else tags.get(name) == value
            for name, value in wanted.items()
        )

    return takes


def is_bound_write(tags: Mapping[str, object]) -> bool:
    """Of the writes that the lines above "any of the above" speak of."""
    return tags.get("work") == "rewrite" or any(
        must.takes(tags)
        for must in MUST
        if must.baseline == RAW and must.work.startswith("growing")
    )


RAW = "raw"
QEMU = "qemu-img bench"
UNBUFFERED_DURABLE = {"cache": "directsync", "work": "grow"}
#: Times of qcow2x over times of the other, medians of one run.
MUST: list[Must] = [
    Must("growing, 64 KiB sequential, directsync and writethrough, depth 1", RAW, 0.90,
         tagged(work="grow", nbytes=64 * KIB, pattern="sequential", depth=1,
                cache=("directsync", "writethrough"))),
    Must("growing, 4 KiB sequential, directsync, depth 1", RAW, 0.75,
         tagged(**UNBUFFERED_DURABLE, nbytes=4 * KIB, pattern="sequential", depth=1)),
    Must("growing, 4 KiB scattered, directsync, depth 1", RAW, 1.25,
         tagged(**UNBUFFERED_DURABLE, nbytes=4 * KIB, pattern="scattered", depth=1)),
    Must("growing, 4 KiB scattered, directsync, depth 32", RAW, 1.05,
         tagged(**UNBUFFERED_DURABLE, nbytes=4 * KIB, pattern="scattered", depth=32)),
    Must("growing, 4 KiB scattered, none", RAW, 1.05,
         tagged(work="grow", nbytes=4 * KIB, pattern="scattered", cache="none", depth=1)),
    Must("growing, 64 KiB sequential, none", RAW, 1.05,
         tagged(work="grow", nbytes=64 * KIB, pattern="sequential", cache="none", depth=1)),
    Must("rewriting, every size and mode: the worst", RAW, 1.03, tagged(work="rewrite")),
    Must("any of the above: the median", QEMU, 0.90, is_bound_write, statistics.median),
    Must("any of the above: the worst", QEMU, 1.00, is_bound_write),
    Must("cached 4 KiB random read, one thread", RAW, 1.12,
         tagged(work="read", nbytes=4 * KIB, pattern="scattered", warm=True, depth=1)),
    Must("cached 4 KiB random read, 2 threads", RAW, 1.12,
         tagged(work="read", nbytes=4 * KIB, pattern="scattered", warm=True, depth=2)),
    Must("the same through a chain of 50", "depth 1", 1.10, tagged(work="chain", depth=50)),
    Must("convert raw to qcow2, cached", "qemu-img", 0.90, tagged(work="raw to qcow2")),
    Must("convert raw to qcow2, cached", "cp", 1.10, tagged(work="raw to qcow2")),
    Must("convert qcow2 to raw, cached", "qemu-img", 0.90, tagged(work="qcow2 to raw")),
    Must("convert qcow2 to raw, cached", "cp", 1.10, tagged(work="qcow2 to raw")),
    Must("convert -c zlib, default level, mixed files", "qemu-img -W -m 16", 0.12,
         tagged(work="compress", type="zlib", level="default")),
    Must("convert -c zlib, best level", "qemu-img -W -m 16", 0.80,
         tagged(work="compress", type="zlib", level="best")),
    Must("convert -c zstd", "qemu-img", 0.45, tagged(work="compress", type="zstd")),
    Must("compressed to raw, zlib", "qemu-img", 0.35, tagged(work="decompress", type="zlib")),
    Must("compressed to raw, zstd", "qemu-img", 0.60, tagged(work="decompress", type="zstd")),
    Must("snapshot create and delete, 1 TiB of metadata", "qemu-img", 0.15,
         tagged(work="snapshot")),
    Must("check of the same", "qemu-img", 0.33, tagged(work="check")),
]  # fmt: skip


@dataclass
class Table:
    rows: list[Row] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)

    def verdicts(self) -> list[Verdict]:
        return [must.verdict(self.rows) for must in MUST]
