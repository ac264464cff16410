"""How the benchmarks measure, and the table of ratios at their end.

    pytest bench

Each result stands beside its baselines from the same run and the same round: the raw file and
qcow2x take turns by stretches of a few milliseconds, QEMU runs before or after. A ratio is the
median over the rounds; more than 1 is faster than the baseline. No benchmark fails for being slow.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qcow2x.demo.race import takes_direct

ROUNDS = 9


@dataclass
class Row:
    """One line of the table; ``seconds`` by who took them, ours under "qcow2x"."""

    name: str
    requests: int
    seconds: dict[str, list[float]]
    targets: Mapping[str, float]

    def ratio(self, baseline: str) -> float:
        pairs = zip(self.seconds[baseline], self.seconds["qcow2x"], strict=True)
        return statistics.median(base / ours for base, ours in pairs)

    def baselines(self) -> list[str]:
        return [who for who in self.seconds if who != "qcow2x"]

    def ratios(self) -> dict[str, float]:
        return {who: self.ratio(who) for who in self.baselines()}

    def microseconds(self, who: str) -> float:
        return statistics.median(self.seconds[who]) / self.requests * 1e6


@dataclass
class Fact:
    """A figure with a bound instead of a baseline."""

    name: str
    value: str
    bound: str
    holds: bool


@dataclass
class Table:
    rows: list[Row] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)


TABLE = pytest.StashKey[Table]()


def pytest_configure(config):
    config.stash[TABLE] = Table()


class OwnTime:
    """A timer for pytest-benchmark that shows the time ours took. A round holds everybody's
    requests, preparation and all; only the round itself knows whose time is whose."""

    def __init__(self) -> None:
        self.now = 0.0

    def add(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        # The plugin waits for a clock to tick before it trusts it.
        self.now += 1e-9
        return self.now


OWN_TIME = OwnTime()


def pytest_collection_modifyitems(items):
    for item in items:
        if "versus" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=OWN_TIME))


@pytest.fixture
def versus(benchmark, request):
    """Runs rounds; *one_round* gives everybody the same requests and returns who took how many
    seconds, ours as "qcow2x"."""

    def measure(
        name: str,
        one_round: Callable[[], dict[str, float]],
        *,
        requests: int,
        targets: Mapping[str, float] | None = None,
        rounds: int = ROUNDS,
    ) -> None:
        taken: list[dict[str, float]] = []

        def run() -> None:
            taken.append(one_round())
            OWN_TIME.add(taken[-1]["qcow2x"])

        one_round()
        benchmark.group = name
        benchmark.pedantic(run, rounds=rounds)
        seconds = {who: [times[who] for times in taken] for who in taken[0]}
        row = Row(name, requests, seconds, targets or {})
        benchmark.extra_info.update(requests=requests, seconds=seconds, ratios=row.ratios())
        request.config.stash[TABLE].rows.append(row)

    return measure


@pytest.fixture
def fact(request):
    """Puts a figure and its bound into the table."""

    def add(name: str, value: str, bound: str, holds: bool) -> None:
        request.config.stash[TABLE].facts.append(Fact(name, value, bound, holds))

    return add


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def cache(request, folder):
    """A cache mode; the uncached ones only where the file system has O_DIRECT."""
    if request.param in ("none", "directsync") and not takes_direct(folder):
        pytest.skip(f"{folder} is on a file system that refuses O_DIRECT")
    return request.param


def verdict(holds: bool) -> str:
    return "holds" if holds else "misses"


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash[TABLE]
    if not (table.rows or table.facts):
        return
    write = terminalreporter.write_line
    terminalreporter.section("qcow2x beside its baselines (a ratio above 1 is faster)")
    write(f"{'':<46}{'us/request':>11}  {'baseline':<16}{'us/request':>11}{'ratio':>8}  target")
    for row in table.rows:
        for i, who in enumerate(row.baselines()):
            ratio = row.ratio(who)
            target = row.targets.get(who)
            end = f"{target:.2f} {verdict(ratio >= target)}" if target else ""
            ours = f"{row.name:<46}{row.microseconds('qcow2x'):11.2f}" if i == 0 else " " * 57
            write(f"{ours}  {who:<16}{row.microseconds(who):11.2f}{ratio:8.3f}  {end}".rstrip())
    for item in table.facts:
        write(f"{item.name:<46}{item.value:>32}  {item.bound}  {verdict(item.holds)}")
