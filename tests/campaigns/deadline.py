"""A plugin of pytest: --seconds N ends a run after the test that is under way by then, --seed N
chooses the order, so that a short run sees some of everything, and --told FILE says how many tests
there were, by outcome, so far."""

from __future__ import annotations

import collections
import json
import random
import time
from pathlib import Path

import pytest

#: Tests of one file that stay together, as they share what was dear to make.
TOGETHER = 6


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("campaign")
    group.addoption("--seconds", type=float, help="begin no test after so long")
    group.addoption("--seed", type=int, help="of the order of the tests")
    group.addoption("--told", type=Path, help="outcomes, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Deadline(config))


class Deadline:
    def __init__(self, config: pytest.Config) -> None:
        seconds: float | None = config.getoption("seconds")
        self.end = None if seconds is None else time.monotonic() + seconds
        self.seed: int | None = config.getoption("seed")
        self.told: Path | None = config.getoption("told")
        self.outcomes: collections.Counter[str] = collections.Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.seed is None:
            return
        files: dict[Path, list[pytest.Item]] = {}
        for item in items:
            files.setdefault(item.path, []).append(item)
        rng = random.Random(self.seed)
        groups = []
        for number, of_file in enumerate(files.values()):
            parts = [of_file[at : at + TOGETHER] for at in range(0, len(of_file), TOGETHER)]
            rng.shuffle(parts)
            # A file of a thousand tests has its turn as often as one of ten, while that one lasts.
            groups += [((turn + rng.random()), number, part) for turn, part in enumerate(parts)]
        items[:] = [item for _, _, part in sorted(groups, key=lambda g: g[:2]) for item in part]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Once it is too late, tests count as run and are not heard of: short of time is no failure."""
        return True if self.end is not None and time.monotonic() > self.end else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        if self.told is not None:
            self.told.write_text(json.dumps(self.outcomes))
