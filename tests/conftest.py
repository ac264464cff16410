"""Settings of the whole suite."""

from datetime import timedelta

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every run, so that a red run is red again; --hypothesis-profile=long looks
# for new ones, many more, and remembers what it found.
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    max_examples=100,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "long",
    settings.get_profile("repeatable"),
    derandomize=False,
    max_examples=5000,
    deadline=timedelta(seconds=60),
)
settings.load_profile("repeatable")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how much of the matrix against QEMU ran: a matrix that shrank must not go unseen."""
    cells = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call" and "test_interop_" in report.nodeid
    ]
    if cells:
        terminalreporter.write_line(f"{len(cells)} cells of the matrix with QEMU were run")
