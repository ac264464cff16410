#!/usr/bin/env python3
"""Run the suite under image options other than the defaults, beside what the system's tools pass.

    matrix.py [--source DIR] [--only OPTIONS]... [--record] [TEST ...]

The expected output is QEMU's own at its defaults, and each test says itself with which options it
makes no sense ("not run"). So what counts is the comparison: the status is 1 if under some option
fewer tests pass with our programs than with the system's. What those pass stands in system.txt, made
by --record, which runs them instead of ours. Either takes an hour or more.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fetch import CACHE, FetchError, check_source, fetch
from run import Log, arguments, nbd_of_the_suite, read_expected
from suite import HERE, Outcome, Programs, Suite

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
RECORD = HERE / "system.txt"
_HEAD = """\
# What passes with the system's own tools under each of these image options, made by matrix.py --record.
# options: how many ran: those that passed: those that ran out of time, of which nothing is known
"""


class Result(NamedTuple):
    """What became of the tests under one option."""

    ran: int
    passed: frozenset[str]
    #: Not judged, and left out of any comparison.
    unknown: frozenset[str] = frozenset()

    def __str__(self) -> str:
        rate = f" ({len(self.passed) / self.ran:.1%})" if self.ran else ""
        return f"{len(self.passed):3} of {self.ran} passed{rate}"


def read_record() -> dict[str, Result]:
    record = {}
    for line in RECORD.read_text().splitlines() if RECORD.exists() else ():
        if not line.startswith("#"):
            options, ran, *sets = line.split(": ")
            record[options] = Result(int(ran), *(frozenset(names.split()) for names in sets))
    return record


def write_record(record: dict[str, Result]) -> None:
    lines = []
    for options in OPTIONS:
        if options in record:
            ran, *sets = record[options]
            names = [" ".join(sorted(each)) for each in sets if each]
            lines.append(f"{': '.join([options, str(ran), *names])}\n")
    RECORD.write_text(_HEAD + "".join(lines))


def main() -> int:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", action="append", choices=OPTIONS, metavar="OPTIONS", help="one of the options"
    )
    parser.add_argument(
        "--record", action="store_true", help="run the system's tools, and note what they pass"
    )
    args = parser.parse_args()
    tests = args.tests or list(read_expected())
    whose = "system" if args.record else "ours"
    try:
        folder = check_source(args.source or fetch())
        nbd = None if args.record else nbd_of_the_suite()
        programs = Programs(CACHE / f"programs-{whose}", whose, whose, nbd)
    except (FetchError, OSError) as exc:
        print(f"matrix.py: {exc}", file=sys.stderr)
        return 1
    print(programs.versions(), flush=True)
    record = read_record()
    rows = []
    for options in args.only or OPTIONS:
        suite = Suite(folder, programs, options=options, timeout=args.timeout)
        log = Log(args.results / options.replace("$", "") / whose, f"{options:<36}")
        outcomes = suite.run(tests, args.jobs, log)
        rows.append((options, summed(outcomes)))
        if args.record and not args.tests:
            record[options] = rows[-1][1]
            write_record(record)
    return conclude(rows, {} if args.record else record, set(tests))


def summed(outcomes: list[Outcome]) -> Result:
    """What ran out of time may have been slow on this machine only: it has not failed."""
    judged = [outcome for outcome in outcomes if outcome.judged]
    ran = sum(outcome.state != "not run" for outcome in judged)
    passed = frozenset(outcome.test for outcome in judged if outcome.state == "pass")
    return Result(ran, passed, frozenset(o.test for o in outcomes if not o.judged))


def conclude(rows: list[tuple[str, Result]], record: dict[str, Result], tests: set[str]) -> int:
    """Print a line for each option; returns the exit status."""
    print()
    worse = False
    for options, result in rows:
        line = f"{options:<36}{result}"
        if result.unknown:
            line += f"; nothing is known of {' '.join(sorted(result.unknown))}"
        if options in record:
            theirs = record[options].passed & tests
            ours = result.passed - record[options].unknown
            worse |= len(ours) < len(theirs)
            line += f"; with the system's tools {len(theirs)}"
        print(line)
        if options in record and theirs - ours:
            print("    only with the system's:", *sorted(theirs - ours))
        if options in record and ours - theirs:
            print("    only with ours:", *sorted(ours - theirs))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
