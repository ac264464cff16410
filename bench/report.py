"""The table as text for a terminal, as ``report.md``, and as plots beside it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from table import OURS, Fact, Row, Table, Verdict

from qcow2x._version import __version__
from qcow2x.demo.chart import Group, bar_chart

SAID = {True: "holds", False: "misses", None: ""}
COLOURS = ["#2563a8", "#e08a2c", "#5a8f3c", "#8c5aa8"]


def terminal_lines(table: Table) -> Iterator[str]:
    yield f"{'':<54}{'us/request':>12}  {'baseline':<18}{'us/request':>12}{'ratio':>7}  {'spread':<11}bound"
    for row in table.rows:
        for i, who in enumerate(row.baselines()):
            ours = f"{row.name:<54}{row.microseconds(OURS):12.2f}" if i == 0 else " " * 66
            yield (
                f"{ours}  {who:<18}{row.microseconds(who):12.2f}{row.ratio(who):7.3f}  "
                f"{row.spread(who):<11}{_own_bound(row, who)}"
            ).rstrip()
    for fact in table.facts:
        yield f"{fact.name:<54}{fact.value:>32}  {fact.bound}  {SAID[fact.holds]}".rstrip()
    yield ""
    yield "must reach: our time over theirs"
    for verdict in table.verdicts():
        yield (
            f"{verdict.must.work:<66}{verdict.must.baseline:<18}"
            f"{_ratio(verdict):>7}  at most {verdict.must.at_most:.2f}  {verdict.said()}"
        )


def _own_bound(row: Row, who: str) -> str:
    bound = row.at_most.get(who)
    return f"{bound:.2f} {SAID[row.ratio(who) <= bound]}" if bound else ""


def _ratio(verdict: Verdict) -> str:
    return "-" if verdict.ratio is None else f"{verdict.ratio:.3f}"


def write(table: Table, folder: Path, disks: Path, rounds: int) -> Path:
    """``report.md`` and its plots in *folder*; *disks* is where the measured files lay."""
    out = ["# Benchmarks", ""]
    out += [f"- {line}" for line in _machine(disks, rounds)]
    out += [
        "",
        "Ratios are our time over the other's, below 1 is faster: medians over rounds in which all",
        "took turns; of rewriting and reading beside a raw file, over all stretches in which both did.",
        "The spread is the lowest and the highest round.",
        "",
    ]
    out += ["## Must reach", "", "| work | against | ratio | at most | | worst of |"]
    out += ["|---|---|---:|---:|---|---|"]
    for verdict in table.verdicts():
        of = f"{verdict.rows}: {verdict.worst}" if verdict.rows > 1 else ""
        out.append(
            f"| {verdict.must.work} | {verdict.must.baseline} | {_ratio(verdict)} "
            f"| {verdict.must.at_most:.2f} | {verdict.said()} | {of} |"
        )
    out += _facts(table.facts)
    out += ["", "## All rows", "", "| work | us | against | us | ratio | spread | at most |"]
    out += ["|---|---:|---|---:|---:|---|---|"]
    for row in table.rows:
        for who in row.baselines():
            out.append(
                f"| {row.name} | {row.microseconds(OURS):.2f} | {who} | {row.microseconds(who):.2f} "
                f"| {row.ratio(who):.3f} | {row.spread(who)} | {_own_bound(row, who)} |"
            )
    for name, title in _plots(table, folder):
        out += ["", f"![{title}]({name})"]
    path = folder / "report.md"
    path.write_text("\n".join(out) + "\n")
    return path


def _facts(facts: list[Fact]) -> list[str]:
    out = ["", "| figure | value | bound | |", "|---|---|---|---|"] if facts else []
    return out + [f"| {f.name} | {f.value} | {f.bound} | {SAID[f.holds]} |" for f in facts]


# --- the machine --------------------------------------------------------------------------


def _machine(disks: Path, rounds: int) -> Iterator[str]:
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    yield f"CPU: {_cpu()}, {len(os.sched_getaffinity(0))} usable; load average at the end {load}"
    yield f"kernel {platform.release()}, {_file_system(disks)}, Python {sys.version.split()[0]}"
    yield f"qcow2x {__version__}, {_first_line('qemu-img', '--version')}"
    yield f"{rounds} rounds (fewer where one takes long)"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _file_system(path: Path) -> str:
    """What the mount with the longest name in front of *path* says."""
    best = ("", "", "")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, where, kind = line.split()[:3]
        if path.resolve().is_relative_to(where) and len(where) >= len(best[0]):
            best = (where, kind, device)
    return f"{best[1]} on {best[2]}"


def _first_line(*command: str) -> str:
    said = subprocess.run(command, capture_output=True, text=True)
    return said.stdout.splitlines()[0] if said.stdout else f"no {command[0]}"


# --- plots --------------------------------------------------------------------------------


def _plots(table: Table, folder: Path) -> Iterator[tuple[str, str]]:
    """A file per kind of work: how long each takes, with the first baseline as 1."""
    kinds = {
        "grow": "Writing to a disk that grows",
        "rewrite": "Rewriting what was written before",
        "read": "Reading",
        "image": "Converting, compressing, checking, snapshots",
    }
    for kind, title in kinds.items():
        rows = [row for row in table.rows if row.tags.get("plot") == kind]
        if not rows:
            continue
        name = f"plot-{kind}.svg"
        (folder / name).write_text(_plot(title, rows))
        yield name, title


def _plot(title: str, rows: list[Row]) -> str:
    who = list(dict.fromkeys(name for row in rows for name in row.rounds[0].seconds))
    groups = []
    for row in rows:
        base = row.microseconds(row.baselines()[0])
        values = [
            row.microseconds(name) / base if name in row.rounds[0].seconds else None for name in who
        ]
        groups.append(Group(row.name, tuple(values)))
    series = [(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(who)]
    return bar_chart(
        title, "time, the first baseline = 1; shorter is faster", series, groups, (1.0, "1")
    )
