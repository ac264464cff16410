"""A plugin of pytest: --seconds N ends a run after the test that is under way by then, and
--told FILE says how many tests there were, by outcome, so far."""

from __future__ import annotations

import collections
import json
import time
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("campaign")
    group.addoption("--seconds", type=float, help="begin no test after so long")
    group.addoption("--told", type=Path, help="outcomes, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Deadline(config.getoption("seconds"), config.getoption("told")))


class Deadline:
    def __init__(self, seconds: float | None, told: Path | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds
        self.told = told
        self.outcomes: collections.Counter[str] = collections.Counter()

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
