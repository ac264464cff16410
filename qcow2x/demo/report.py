"""What the demo prints: steps with their times, the table and the chart."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from qcow2x.demo.chart import Group, bar_chart
from qcow2x.demo.rounds import OURS, QEMU, RAW, Result

COLOURS = {OURS: "#2563a8", QEMU: "#e08a2c"}


def human(nbytes: float) -> str:
    """``1.5 GiB``: bytes for a person."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"


class Report:
    """Prints the story as it happens."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.n_steps = 0

    def line(self, text: str = "") -> None:
        print(text, file=self.out, flush=True)

    def step(self, title: str) -> None:
        self.n_steps += 1
        self.line()
        self.line(f"{self.n_steps}. {title}")

    @contextmanager
    def doing(self, what: str) -> Iterator[list[str]]:
        """A line that ends with what it came to (appended to the list) and the time it took."""
        said: list[str] = []
        print(f"   {what} ...", end="", file=self.out, flush=True)
        start = time.perf_counter()
        try:
            yield said
        except BaseException:
            self.line()
            raise
        took = time.perf_counter() - start
        self.line(f" {', '.join([*said, f'{took:.1f} s'])}")

    def race_head(self) -> None:
        self.line()
        self.line(f"   {'':<45}{'microseconds per request':^27}  {'times as fast as':^24}")
        self.line(
            f"   {'mode, image, requests':<45}{'raw':>9}{'qcow2x':>9}{'QEMU':>9}  "
            f"{'qcow2x':>8}{'QEMU':>8}{'qcow2x':>8}"
        )
        self.line(f"   {'':<45}{'':27}  {'/raw':>8}{'/raw':>8}{'/QEMU':>8}")

    def race_row(self, result: Result) -> None:
        times = "".join(f"{result.microseconds(who):9.1f}" for who in (RAW, OURS, QEMU))
        self.line(
            f"   {result.cell.label:<45}{times}  {result.ratio(OURS, RAW):8.2f}"
            f"{result.ratio(QEMU, RAW):8.2f}{result.ratio(OURS, QEMU):8.2f}"
        )


def race_chart(results: list[Result], subtitle: str) -> str:
    """The table's ratios to the raw file as SVG text."""
    groups = [
        Group(result.cell.label, (result.ratio(OURS, RAW), result.ratio(QEMU, RAW)))
        for result in results
    ]
    return bar_chart(
        "Guest writes: speed relative to a raw file",
        subtitle,
        [(f"qcow2x {chr(0xF7)} raw", COLOURS[OURS]), (f"QEMU {chr(0xF7)} raw", COLOURS[QEMU])],
        groups,
        (1.0, "raw file"),
    )
