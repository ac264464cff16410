"""``qcow2x demo``: what qcow2x does, on a real disk made from this machine's files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qcow2x.cli.options import Option, UsageError, image_size, parse

OPTIONS = (
    Option("", "dir", "DIR", "where the big files go (/var/tmp)"),
    Option("", "keep", None, "keep them"),
    Option("", "plot", "FILE", "where the chart goes (qcow2x-demo.svg)"),
    Option("", "race-seconds", "N", "about how long the race may take (45)"),
    Option("", "size", "SIZE", "bytes of files on the disk (1G)"),
)
USAGE = "[--dir=DIR] [--keep] [--plot=FILE] [--race-seconds=N] [--size=SIZE]"
MIN_SIZE = 16 << 20


def main(argv: list[str]) -> int:
    parsed = parse("demo", USAGE, OPTIONS, argv)
    if parsed.args:
        raise UsageError(f"Unexpected argument: {parsed.args[0]}")
    size = image_size(parsed.value("size") or "1G", "size")
    if size < MIN_SIZE:
        raise UsageError("the size must be at least 16M")
    try:
        seconds = float(parsed.value("race-seconds") or "45")
    except ValueError:
        raise UsageError("--race-seconds takes a number") from None

    from qcow2x.demo.programs import DemoFailure, require_programs
    from qcow2x.demo.report import Report
    from qcow2x.demo.story import Options, tell

    options = Options(
        folder=Path(parsed.value("dir") or _scratch_folder()),
        size=size,
        keep=parsed.flag("keep"),
        plot=Path(parsed.value("plot") or "qcow2x-demo.svg"),
        race_seconds=seconds,
    )
    try:
        require_programs()
        tell(options, Report())
    except DemoFailure as exc:
        sys.stdout.flush()
        print(f"qcow2x demo: {exc}", file=sys.stderr)
        return 1
    return 0


def _scratch_folder() -> str:
    """On disk, if it can be: /tmp is memory on many machines, and memory has no O_DIRECT."""
    given = os.environ.get("TMPDIR")
    if given:
        return given
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else "/tmp"
