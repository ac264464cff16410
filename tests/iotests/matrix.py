#!/usr/bin/env python3
"""Run the suite under image options other than the defaults, with our programs and the system's.

    matrix.py [--source DIR] [--only OPTIONS]... [TEST ...]

The expected output is QEMU's own at its defaults, and each test says itself with which options it
makes no sense ("not run"). So what counts is the comparison: the status is 1 if under some option
fewer tests pass with our programs than with the system's. It takes over an hour.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fetch import CACHE, FetchError, check_source, fetch
from run import Log, arguments, read_expected
from suite import Outcome, Programs, Suite

#: What QEMU's developers run the suite with, besides nothing.
OPTIONS = (
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "refcount_bits=1",
    "refcount_bits=64",
    "data_file=$TEST_IMG.ext_data_file",
    "extended_l2=on",
    "compression_type=zstd",
    "lazy_refcounts=on",
)


def main() -> int:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", action="append", choices=OPTIONS, metavar="OPTIONS", help="one of the options"
    )
    args = parser.parse_args()
    tests = args.tests or list(read_expected())
    try:
        folder = check_source(args.source or fetch())
        programs = {
            whose: Programs(CACHE / f"programs-{whose}", whose, whose)
            for whose in ("ours", "system")
        }
    except (FetchError, OSError) as exc:
        print(f"matrix.py: {exc}", file=sys.stderr)
        return 1
    rows = []
    for options in args.only or OPTIONS:
        results = {}
        for whose in ("system", "ours"):
            suite = Suite(folder, programs[whose], options=options, timeout=args.timeout)
            log = Log(args.results / options.replace("$", "") / whose, f"{whose:<7}{options:<36}")
            results[whose] = suite.run(tests, args.jobs, log)
        rows.append((options, results["ours"], results["system"]))
    return conclude(rows)


def conclude(rows: list[tuple[str, list[Outcome], list[Outcome]]]) -> int:
    """Print a line for each option; returns the exit status."""
    print()
    worse = False
    for options, ours, theirs in rows:
        mine, other = _passed(ours), _passed(theirs)
        worse |= len(mine) < len(other)
        print(f"{options:<36}{_rate(mine, ours)}; with the system's tools{_rate(other, theirs)}")
        if other - mine:
            print("    only with the system's:", *sorted(other - mine))
        if mine - other:
            print("    only with ours:", *sorted(mine - other))
    return 1 if worse else 0


def _passed(outcomes: list[Outcome]) -> set[str]:
    return {outcome.test for outcome in outcomes if outcome.state == "pass"}


def _rate(passed: set[str], outcomes: list[Outcome]) -> str:
    ran = sum(outcome.state != "not run" for outcome in outcomes)
    return f" {len(passed):3} of {ran} passed" + (f" ({len(passed) / ran:.1%})" if ran else "")


if __name__ == "__main__":
    sys.exit(main())
