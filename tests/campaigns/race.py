"""Threads of every kind on one image, under ThreadSanitizer: python -m campaigns.race [--seconds N]

What they do is campaigns/crowd.py's; a round has an image of another shape each time. Data races, and
locks taken in orders that may end in a deadlock, are ThreadSanitizer's to find. It sees nothing of
what the interpreter does inside but its calls of the C library; of its reports count those in which
the core itself makes one of the two accesses.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from campaigns import sanitizer

KIND = "tsan"
HANG = 300
#: Exit status of a process in which ThreadSanitizer had something to say, the interpreter's included.
SAID_SOMETHING = 66


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m campaigns.race", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--rounds", type=int, help="so many, whatever they take")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args(argv)
    if args.inside:
        return _inside(args)
    python = sanitizer.build(KIND)
    with tempfile.TemporaryDirectory(prefix="qcow2x-race-") as folder:
        told = Path(folder, "told")
        reports = Path(folder, "report")
        words = [f"--seconds={args.seconds}", f"--seed={args.seed}", f"--json={told}"]
        words += [f"--rounds={args.rounds}"] if args.rounds else []
        status = subprocess.run(
            [python, "-m", "campaigns.race", "--inside", *words],
            env={**os.environ, "QCOW2X_TSAN": f"log_path={reports}"},
        ).returncode
        races = [part for path in sorted(Path(folder).glob("report*")) for part in _reports(path)]
        figures: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {}
    for report in races[:5]:
        print(report, file=sys.stderr)
    figures |= {"races": len(races), "status": status, "seed": args.seed}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    said = ", ".join(f"{value:,} {name}" for name, value in figures.get("operations", {}).items())
    failed = bool(races) or status not in (0, SAID_SOMETHING) or not figures.get("operations")
    print(f"{figures.get('rounds', 0)} rounds: {said}: {len(races)} races, status {status}")
    return 1 if failed else 0


def _reports(path: Path) -> list[str]:
    parts = path.read_text(errors="replace").split("==================")
    found = [part.strip() for part in parts if "WARNING: ThreadSanitizer" in part]
    return [report for report in found if any(map(_of_the_core, report.split("\n\n")[:3]))]


def _of_the_core(stack: str) -> bool:
    """Whether the innermost function that is not the C library's is one of the core."""
    frames = [line for line in stack.splitlines() if line.lstrip().startswith("#")]
    inner = next((line for line in frames if "libtsan" not in line), "")
    return "_core" in inner


def _inside(args: argparse.Namespace) -> int:
    """Under the sanitizer."""
    from campaigns.crowd import Round, Shape

    end = time.monotonic() + args.seconds
    counts: Counter[str] = Counter()
    rounds = 0
    while rounds == 0 or (rounds < args.rounds if args.rounds else time.monotonic() < end):
        faulthandler.dump_traceback_later(HANG, exit=True)
        seed = args.seed + rounds
        shape = Shape.of(seed)
        with tempfile.TemporaryDirectory(prefix="qcow2x-race-") as folder:
            try:
                Round(Path(folder), shape, seed, counts).run()
            except BaseException:
                print(f"round {seed}, {shape}:", file=sys.stderr)
                raise
        rounds += 1
        args.json.write_text(json.dumps({"rounds": rounds, "operations": counts}))
    faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    sys.exit(main())
