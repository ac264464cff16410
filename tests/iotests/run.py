#!/usr/bin/env python3
"""Run QEMU's own tests of qcow2 (qemu-iotests) with qcow2x's programs in place of QEMU's.

    run.py [--source DIR] [--tools ours|system] [-o OPTIONS] [TEST ...]

Which tests there are, and what is expected of each, stands in expected.txt. The status is 1 if one
that is expected to pass does not.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fetch import CACHE, FetchError, check_source, fetch, fetch_nbd
from suite import HERE, Outcome, Programs, Suite

EXPECTED = HERE / "expected.txt"
#: Lines of a failure's diff that are printed; all of it is kept in the results folder.
SHOWN_LINES = 40


class Expected(NamedTuple):
    """A line of expected.txt: ``pass``, ``open`` (not yet) or ``differs`` (on purpose, why)."""

    state: str
    reason: str


def read_expected(path: Path = EXPECTED) -> dict[str, Expected]:
    expected = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            name, state, reason = (line.split(None, 2) + [""])[:3]
            if state not in ("pass", "open", "differs") or (state == "differs") != bool(reason):
                raise ValueError(f"{path}: {line}")
            expected[name] = Expected(state, reason)
    return expected


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--source", type=Path, help="QEMU's source tree (default: fetched)")
    parser.add_argument("-j", dest="jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--timeout", type=float, default=180, help="seconds for one test")
    parser.add_argument("--results", type=Path, default=CACHE / "results")
    parser.add_argument("tests", nargs="*", metavar="TEST", help="default: all of expected.txt")
    return parser


def nbd_of_the_suite() -> Path | None:
    """qemu-nbd as the expected output knows it. The system's, which may be older, where that cannot be
    had: it says less of itself in one test."""
    try:
        return fetch_nbd()
    except FetchError as exc:
        print(f"the system's qemu-nbd it is: {exc}", file=sys.stderr)
        return None


class Log:
    """Prints a line for each test, and keeps the diffs of failures in a folder."""

    def __init__(self, folder: Path, label: str = "") -> None:
        self._folder = folder
        self._label = label
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.diff"):
            old.unlink()

    def __call__(self, outcome: Outcome) -> None:
        with self._lock:
            told = f"{self._label}{outcome.test:<28} {outcome.state:<8}{outcome.seconds:7.1f} s"
            print(f"{told}  {outcome.reason}".rstrip(), flush=True)
            if outcome.state == "fail":
                (self._folder / f"{outcome.test}.diff").write_text(outcome.diff + "\n")


def print_failure(outcome: Outcome, whole: bool) -> None:
    print(f"\n---- {outcome.test}: {outcome.reason or outcome.state}")
    lines = outcome.diff.splitlines()
    shown = lines if whole else lines[:SHOWN_LINES]
    print("\n".join(shown))
    if len(shown) < len(lines):
        print(f"[{len(lines) - len(shown)} lines more]")


def main() -> int:
    parser = arguments((__doc__ or "").splitlines()[0])
    whose = ("ours", "system")
    parser.add_argument("--tools", choices=whose, default="ours", help="both programs (ours)")
    parser.add_argument("--img", choices=whose, help="qemu-img alone")
    parser.add_argument("--io", choices=whose, help="qemu-io alone")
    parser.add_argument("-o", dest="options", help="options for each image, as create -o has them")
    parser.add_argument("-v", dest="verbose", action="store_true", help="print diffs whole")
    parser.add_argument(
        "--update", action="store_true", help="in expected.txt, mark what passes now"
    )
    args = parser.parse_args()
    expected = read_expected()
    tests = args.tests or list(expected)
    try:
        folder = check_source(args.source or fetch())
        ours = "ours" in (args.img or args.tools, args.io or args.tools)
        programs = Programs(
            CACHE / "programs",
            args.img or args.tools,
            args.io or args.tools,
            nbd_of_the_suite() if ours else None,
        )
    except (FetchError, OSError) as exc:
        print(f"run.py: {exc}", file=sys.stderr)
        return 1
    print(programs.versions(), flush=True)
    suite = Suite(folder, programs, options=args.options, timeout=args.timeout)
    outcomes = suite.run(tests, args.jobs, Log(args.results))
    return conclude(outcomes, expected, verbose=args.verbose, update=args.update)


def conclude(
    outcomes: list[Outcome], expected: dict[str, Expected], *, verbose: bool, update: bool
) -> int:
    """Print what failed and how many; returns the exit status."""
    passed = {outcome.test for outcome in outcomes if outcome.state == "pass"}
    for outcome in outcomes:
        if outcome.state == "fail":
            print_failure(outcome, verbose)
    print()
    broken = []
    for outcome in outcomes:
        known = expected.get(outcome.test, Expected("pass", ""))
        if outcome.test in passed:
            if known.state != "pass":
                print(f"{outcome.test} passes now, where expected.txt says '{known.state}'")
        elif known.state == "pass":
            broken.append(outcome.test)
        elif known.state == "differs":
            print(f"{outcome.test} differs on purpose: {known.reason}")
    if broken:
        print("failed, where expected.txt says 'pass':", *broken)
    print(f"{len(passed)} passed, {len(outcomes) - len(passed)} failed")
    if update:
        mark_passing(passed)
    return 1 if broken else 0


def mark_passing(passed: set[str]) -> None:
    lines = []
    for line in EXPECTED.read_text().splitlines():
        name, _, state = line.partition(" ")
        lines.append(f"{name} pass" if name in passed and state.startswith("open") else line)
    EXPECTED.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    # Ended like an interruption, so that no test is left running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
