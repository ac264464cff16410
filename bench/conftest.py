"""How the benchmarks measure, and the table of ratios at their end.

    pytest bench

Each result stands beside its baselines from the same run and the same round, in which everybody
takes turns. A ratio is our time over the baseline's, below 1 is faster: the median over the rounds, or,
of rewriting and reading, where both take turns within a round and one stretch is like the other, over
all of those. No benchmark fails for being slow. ``report.md`` and its plots are written beside this file.

QCOW2X_BENCH_ROUNDS sets the number of rounds (default 7; those that take many seconds have fewer; writes
that a bound of percents is held to have three times as many, and go on, up to three times that, until their
ratio to the raw file is known to 0.01 and that to QEMU to 0.03, whatever they are),
QCOW2X_BENCH_DIR the folder on whose file system the disks lie.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import report
from qemu import Qemu
from table import OURS, QEMU, RAW, Fact, Round, Row, Table, is_bound_write

from qcow2x.demo.race import takes_direct

ROUNDS = int(os.environ.get("QCOW2X_BENCH_ROUNDS") or 7)
#: For work of many seconds.
FEW_ROUNDS = min(ROUNDS, 3)
#: So many times the rounds at most, for a row whose ratios are still uncertain by more than so much.
MOST_TIMES = 3
CERTAIN = {RAW: 0.01, QEMU: 0.03}
TABLE = pytest.StashKey[Table]()
FOLDER = pytest.StashKey[Path]()


def pytest_configure(config):
    config.stash[TABLE] = Table()


def is_uncertain(row: Row) -> bool:
    return any(row.uncertainty(who) > certain for who, certain in CERTAIN.items())


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
    seconds, ours as "qcow2x"; a Round where both took turns by stretches."""

    def measure(
        name: str,
        one_round: Callable[[], dict[str, float] | Round],
        *,
        requests: int = 1,
        tags: Mapping[str, object] | None = None,
        at_most: Mapping[str, float] | None = None,
        rounds: int | None = None,
        warm_up: bool = True,
    ) -> Row:
        taken: list[Round] = []

        def run() -> None:
            this = one_round()
            taken.append(this if isinstance(this, Round) else Round(this))
            OWN_TIME.add(taken[-1].seconds[OURS])

        bound = is_bound_write(tags or {})
        if rounds is None:
            rounds = ROUNDS * 3 if bound else ROUNDS
        if warm_up:
            one_round()
        benchmark.group = name
        benchmark.pedantic(run, rounds=rounds)
        row = Row(name, requests, taken, tags or {}, at_most or {})
        while bound and len(taken) < MOST_TIMES * rounds and is_uncertain(row):
            run()
        seconds = {who: [one.seconds[who] for one in taken] for who in taken[0].seconds}
        ratios = {who: row.ratio(who) for who in row.baselines()}
        benchmark.extra_info.update(requests=requests, seconds=seconds, ratios=ratios)
        request.config.stash[TABLE].rows.append(row)
        return row

    return measure


@pytest.fixture
def fact(request):
    """Puts a figure and its bound into the table."""

    def add(name: str, value: str, bound: str, holds: bool | None) -> None:
        request.config.stash[TABLE].facts.append(Fact(name, value, bound, holds))

    return add


@pytest.fixture(scope="session")
def folder(request) -> Iterator[Path]:
    """Where the disks lie; the fixtures that make large ones remove them when they are done."""
    path = Path(tempfile.mkdtemp(prefix="qcow2x-bench-", dir=os.environ.get("QCOW2X_BENCH_DIR")))
    request.config.stash[FOLDER] = path
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def qemu(folder) -> Qemu:
    return Qemu(folder)


@pytest.fixture
def cache(request, folder):
    """A cache mode; the uncached ones only where the file system has O_DIRECT."""
    if request.param in ("none", "directsync") and not takes_direct(folder):
        pytest.skip(f"{folder} is on a file system that refuses O_DIRECT")
    return request.param


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash[TABLE]
    if not (table.rows or table.facts):
        return
    terminalreporter.section("qcow2x beside its baselines (a ratio below 1 is faster)")
    for line in report.terminal_lines(table):
        terminalreporter.write_line(line)
    disks = config.stash.get(FOLDER, Path.cwd()).parent
    path = report.write(table, Path(__file__).parent, disks, ROUNDS)
    terminalreporter.write_line(f"written: {path}")
