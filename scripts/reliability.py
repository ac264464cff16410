#!/usr/bin/env python3
"""Writes docs/reliability.md from what the campaigns counted: reliability.py [FOLDER [PAGE]]

FOLDER (docs/reliability) holds one JSON file per campaign, named after it, as its --json makes it;
a campaign without a file has no section. `make reliability` runs them and then this.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
Figures = dict[str, Any]

HEAD = """# Reliability

<!-- Made by `make reliability` from docs/reliability/*.json; not edited by hand. -->

What was done to lose data or to make a file that contradicts itself, and what came of it. Each
section says with which command it can be done again, for as long as one likes; a campaign prints its
seeds, and every single run can be repeated by its seed.
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The first column is text, numbers are to the right."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = (f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def crash(figures: Figures) -> str:
    columns = ("runs", "states", "asked_qemu", "corruptions", "lost", "errors")
    rows = [[name, *(row[c] for c in columns)] for name, row in figures["workloads"].items()]
    rows.append(["all", *(sum(row[at] for row in rows) for at in range(1, len(columns) + 1))])
    head = ("workload", "runs", "crash states tried", "of them seen by qemu-img check")
    return f"""## Cuts of power

`make crash STATES=100000`. A storage records every write, hole, truncation and flush of a workload.
A crash state is what a disk with a volatile write cache may hold after a cut: every prefix of the
log; between two flushes every subset of up to eight calls, of more a sample; torn writes by sectors
of 512 bytes; calls in another order. In each state the image is opened, checked and read: no
corruption (leaked clusters are allowed), every byte acknowledged by a flush, by FUA or by the return
of a write in `writethrough` and `directsync` is there, unacknowledged ones are old or new, snapshots
read as before and stay so whatever is written next. Seeds from {figures["seed"]} on,
{figures["seconds"]:,} seconds.

{_table((*head, "corruptions", "acknowledged bytes lost", "other errors"), rows)}

A version 2 image has no dirty bit. A snapshot changes refcounts and COPIED flags, which lie in
different sectors, so a cut in its middle may leave flags that do not match (as it may with QEMU, and
`check` of either counts them as corruptions); the order of the steps sees to it that no flag ever
allows a write to what a snapshot holds, no refcount is too low, and a repair sets them right. All
other damage counts in the table for version 2 as well.
"""


def mutants(figures: Figures) -> str:
    rows = []
    for row in figures["mutants"]:
        text = " ".join(row["why"].split()).replace("|", "\\|")
        where = row["workload"] or "**not found**"
        rows.append([f"`{row['edge']}`", text, where, row["states"]])
    return f"""## Whether the crash test would notice

`make mutants`. Each edge of the order of writes is left out in turn, in a build made for this alone
(`include/qcow2x/edges.h`), and the crash campaign has to find a state that is damaged or lacks an
acknowledged byte.

{_table(("edge left out", "without it / the statement", "found by", "after states"), rows)}
"""


def faults(figures: Figures) -> str:
    return f"""## Calls that fail

`make faults`. Every storage call of every verb fails once, on images of several sorts and on the
files below them, and of work that opens its files itself: with EIO, with ENOSPC, with a write of
which only the front half is there; or the disk is full from that call on, for whatever is tried, until
there is room again. Afterwards the file is sound, old data is there, and the image
works on or refuses writes with a clear error; after lack of room the same verb works once there is
room. A number says how often an outcome was seen.

{_outcomes("verb", figures["verbs"])}

By the site of the call (`include/qcow2x/status.h`):

{_outcomes("site", figures["sites"])}
"""


def _outcomes(title: str, counts: list[list[Any]]) -> str:
    outcomes = sorted({outcome for _, _, outcome, _ in counts})
    seen = {(name, kind, outcome): count for name, kind, outcome, count in counts}
    rows = []
    for name, kind in dict.fromkeys((name, kind) for name, kind, _, _ in counts):
        of_each = [seen.get((name, kind, outcome), 0) for outcome in outcomes]
        rows.append([f"{name}: {kind}", sum(of_each), *of_each])
    return _table((f"{title}: the call fails with", "times", *outcomes), rows)


def soak(figures: Figures) -> str:
    operations = sorted(figures["by_name"].items())
    return f"""## Random operations

`make soak`. Random operations of a seed on random images, beside a model that is an array of bytes:
{figures["operations"]:,} operations in {figures["runs"]:,} runs, seeds from {figures["seed"]} on,
{figures["seconds"]:,} seconds; {len(figures["failures"])} runs found something wrong.

{_table(("operation", "times"), operations)}

The images that were opened for it, by what they were:

{_table(("image", "times"), sorted(figures["shapes"].items()))}
"""


def asan(figures: Figures) -> str:
    rows = []
    for name, part in figures.items():
        if isinstance(part, dict):
            counts = {**part, **part.get("tests", {})}
            counts = {k: v for k, v in counts.items() if isinstance(v, int) and k != "status"}
            told = ", ".join(
                f"{v:,} {k}" for k, v in counts.items() if k not in ("seed", "seconds")
            )
            # A part that there was no time for is none.
            if told or part["status"]:
                rows.append([name, told, "**failed**" if part["status"] else "nothing"])
    return f"""## Under sanitizers

`make asan`. The core built with AddressSanitizer and UndefinedBehaviorSanitizer,
{figures["seconds"]:,} seconds.

{_table(("what ran", "how much", "found"), rows)}
"""


def fuzz(figures: Figures) -> str:
    counts = [[name, value] for name, value in figures.items() if name in _OF_A_FUZZER]
    wrong = figures["wrong"]
    return f"""## Hostile images

`make fuzz`. Coverage-guided: images with mutated headers, tables and streams are opened, inspected,
checked, read, written and repaired, the core watched by the sanitizers. Seed {figures["seed"]},
{figures["seconds"]:,} seconds.

{_table(("", "times"), [*counts, ["images that something went wrong with", len(wrong)]])}
{_told(wrong)}"""


_OF_A_FUZZER = ("executions", "asked of qemu-img", "edges", "kept")


def fuzz_qemu(figures: Figures) -> str:
    commands = sorted(figures["commands"].items())
    wrong = figures["wrong"]
    return f"""## QEMU's own image fuzzer

`make fuzz-qemu`. Of each of {figures["images"]:,} images that it damages, seeds from
{figures["seed"]} on, our programs are asked what it asks QEMU's, and more, under the sanitizers, for
{figures["seconds"]:,} seconds: {sum(figures["commands"].values()):,} commands, of which {len(wrong)}
crashed, hung, ended with a traceback or an unknown status, or took too much memory.

{_table(("command", "times"), commands)}
{_told(wrong)}"""


def race(figures: Figures) -> str:
    operations = sorted(figures["operations"].items())
    return f"""## Threads

`make race`. Threads of every kind on one image, and forks among them, under ThreadSanitizer, seeds
from {figures["seed"]} on: {figures["rounds"]:,} rounds, {figures["races"]} data races.

{_table(("operation", "times"), operations)}
"""


def _told(wrong: list[str]) -> str:
    """What a run found. Each is mended, with a test, before its figures are committed."""
    if not wrong:
        return ""
    found = "\n".join(f"- {what}" for what in wrong)
    return f"\nFound, and mended since, each with a test of its own:\n\n{found}\n"


SECTIONS: dict[str, Callable[[Figures], str]] = {
    "crash": crash,
    "mutants": mutants,
    "faults": faults,
    "soak": soak,
    "fuzz": fuzz,
    "fuzz-qemu": fuzz_qemu,
    "race": race,
    "asan": asan,
}


def main(argv: list[str]) -> int:
    folder = Path(argv[0]) if argv else DOCS / "reliability"
    parts = [HEAD]
    for name, section in SECTIONS.items():
        file = folder / f"{name}.json"
        if file.exists():
            parts.append(section(json.loads(file.read_text())))
    page = Path(argv[1]) if len(argv) > 1 else DOCS / "reliability.md"
    page.write_text("\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
