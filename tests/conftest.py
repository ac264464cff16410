"""Settings of the whole suite."""

import signal
from collections.abc import Generator, Iterator
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, settings
from support import witness

#: The phases of a test that have passed.
PASSED = pytest.StashKey[set[str]]()

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


def pytest_configure() -> None:
    # A shell has what it starts in the background ignore interrupts, and so would every command that a
    # test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash.setdefault(PASSED, set())
    if report.passed:
        item.stash[PASSED].add(report.when)
    return report


@pytest.fixture(autouse=True)
def _qemu_takes_what_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every image that a test leaves behind is sound for QEMU and reads the same, but for the tests
    marked ``not_for_qemu``, which say why. Where ``leaks`` is marked, clusters may have leaked. The
    module's ``PASSPHRASE`` opens those that are encrypted."""
    yield
    folder = request.node.funcargs.get("tmp_path") if hasattr(request.node, "funcargs") else None
    if folder is None or request.node.get_closest_marker("not_for_qemu"):
        return
    if "call" not in request.node.stash.get(PASSED, set()):
        return
    leaks = request.node.get_closest_marker("leaks") is not None
    passphrase = getattr(request.module, "PASSPHRASE", None)
    wrong = []
    for path in witness.images_in(folder):
        if said := witness.testify(path, leaks=leaks, passphrase=passphrase):
            wrong.append(said)
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how much of the matrix against QEMU ran: a matrix that shrank must not go unseen."""
    cells = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call" and "test_interop_" in report.nodeid.partition("::")[0]
    ]
    if cells:
        terminalreporter.write_line(f"{len(cells)} cells of the matrix with QEMU were run")
    if witness.heard["opened and found clean"]:
        told = ", ".join(f"{count} {what}" for what, count in witness.heard.items())
        terminalreporter.write_line(f"images that tests left, looked at by qemu-img: {told}")
