"""The race: every load on every subject in every cache mode, in rounds that take turns."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import qcow2x
from qcow2x.demo import race
from qcow2x.demo.programs import run
from qcow2x.demo.race import Load

SCATTERED, SEQUENTIAL = "4 KiB scattered", "64 KiB sequential"
RAW, OURS, QEMU = SUBJECTS = ("raw", "qcow2x", "QEMU")

#: A round of the raw file lasts about this long; QEMU's, told in milliseconds, mostly twice that.
ROUND_SECONDS = 0.06
MIN_COUNT, MIN_ROUNDS, MAX_ROUNDS = 64, 3, 7
#: Each scattered request on a growing file is a fragment of its own, and file systems take a long
#: time to remove a file of many.
MAX_FRAGMENTS = 1024


@dataclass(frozen=True, slots=True)
class Cell:
    """One race: which requests, on an image in which state, in which mode."""

    cache: str
    #: "growing" starts with an empty image, "rewriting" with one in which every byte was written.
    state: str
    pattern: str

    @property
    def label(self) -> str:
        return f"{self.cache}, {self.state}, {self.pattern}"


@dataclass(slots=True)
class Result:
    cell: Cell
    count: int = 0
    #: Seconds of each round, by subject.
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def microseconds(self, subject: str) -> float:
        """Per request: the median of the rounds."""
        return statistics.median(self.seconds[subject]) / self.count * 1e6

    def ratio(self, subject: str, baseline: str) -> float:
        """How many times as fast as the baseline: the median over rounds, which are run side by
        side, so that what disturbs one disturbs its neighbour as well."""
        pairs = zip(self.seconds[baseline], self.seconds[subject], strict=True)
        return statistics.median(base / own for base, own in pairs)


def all_cells(caches: Iterable[str]) -> list[Cell]:
    return [
        Cell(cache, state, pattern)
        for cache in caches
        for state in ("growing", "rewriting")
        for pattern in (SCATTERED, SEQUENTIAL)
    ]


class Race:
    """Runs the cells in *folder* on disks of *size* bytes."""

    def __init__(self, folder: Path, size: int, budget: float) -> None:
        self.folder = folder
        self.size = size
        #: Seconds for all of it, about.
        self.budget = budget
        self._aio: dict[str, str] = {}
        self._ready = False

    def path(self, subject: str, state: str) -> Path:
        return self.folder / f"{state}-{subject}.{'raw' if subject == RAW else 'qcow2'}"

    def run(self, cells: list[Cell], on_result: Callable[[Result], None]) -> list[Result]:
        results = []
        start = time.monotonic()
        for i, cell in enumerate(cells):
            left = self.budget - (time.monotonic() - start)
            results.append(self._run_cell(cell, left / (len(cells) - i)))
            on_result(results[-1])
        return results

    def _run_cell(self, cell: Cell, seconds: float) -> Result:
        start = time.monotonic()
        if cell.cache not in self._aio:
            self._aio[cell.cache] = race.fastest_qemu_aio(self.folder, cell.cache)
        if cell.state == "rewriting":
            self._make_used_disks()
        load = self._calibrated(cell)
        result = Result(cell, load.count, {subject: [] for subject in SUBJECTS})
        n = 0
        while n < MIN_ROUNDS or (n < MAX_ROUNDS and time.monotonic() - start < seconds):
            raw, ours = self._time_side_by_side(cell, load)
            result.seconds[RAW].append(raw)
            result.seconds[OURS].append(ours)
            result.seconds[QEMU].append(self._time_qemu(cell, load))
            n += 1
        self._verify(cell)
        return result

    def _calibrated(self, cell: Cell) -> Load:
        scattered = cell.pattern == SCATTERED
        make = Load.scattered if scattered else Load.sequential
        nbytes = 4096 if scattered else 65536
        # Once around the disk: a growing image would not grow any more.
        most = self.size // nbytes
        if cell.state == "growing" and scattered:
            most = min(most, MAX_FRAGMENTS)
        load = make(nbytes, min(MIN_COUNT, most), self.size)
        # Twice: one request that the machine kept waiting would make the whole race too short.
        trial = min(self._time_side_by_side(cell, load)[0] for _ in range(2))
        count = int(load.count * ROUND_SECONDS / trial)
        return make(nbytes, max(load.count, min(count, most)), self.size)

    def _make_used_disks(self) -> None:
        if self._ready:
            return
        paths = {subject: self.path(subject, "rewriting") for subject in SUBJECTS}
        fd = race.open_raw(paths[RAW], "writeback", self.size)
        try:
            race.fill(lambda data, off: os.pwritev(fd, [data], off), self.size)
        finally:
            os.close(fd)
        qcow2x.create(paths[OURS], self.size)
        with qcow2x.open(paths[OURS], "r+") as image:
            race.fill(image.pwrite, self.size)
        race.create_qemu(paths[QEMU], self.size)
        everything = Load.sequential(1 << 20, self.size >> 20, self.size)
        race.time_qemu(everything, paths[QEMU], "writeback", write=True)
        self._ready = True

    def _prepare(self, subject: str, cell: Cell) -> Path:
        """A new, empty disk, or the used one with its pages where the mode wants them."""
        path = self.path(subject, cell.state)
        if cell.state == "rewriting":
            (race.make_warm if cell.cache == "writeback" else race.make_cold)(path)
            return path
        # Gone before it is made anew, so that QEMU's programs have nothing to read in it.
        path.unlink(missing_ok=True)
        if subject == OURS:
            qcow2x.create(path, self.size)
        elif subject == QEMU:
            race.create_qemu(path, self.size)
        return path

    def _time_side_by_side(self, cell: Cell, load: Load) -> list[float]:
        raw, image = self._prepare(RAW, cell), self._prepare(OURS, cell)
        fd = race.open_raw(raw, cell.cache, self.size if cell.state == "growing" else None)
        with qcow2x.open(image, "r+", cache=cell.cache) as opened:
            seconds = race.alternate(
                load,
                lambda part: race.time_raw_writes(part, fd),
                lambda part: race.time_image_writes(part, opened),
            )
        race.close_raw(fd)
        return seconds

    def _time_qemu(self, cell: Cell, load: Load) -> float:
        path = self._prepare(QEMU, cell)
        return race.time_qemu(load, path, cell.cache, write=True, aio=self._aio[cell.cache])

    def _verify(self, cell: Cell) -> None:
        """The raw file and the image got the same bytes: QEMU finds them equal, and nothing
        to complain about."""
        path = partial(self.path, state=cell.state)
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", path(RAW), path(OURS))
        run("qemu-img", "check", "-q", "-f", "qcow2", path(OURS))
        if cell.state == "growing":
            for subject in SUBJECTS:
                path(subject).unlink()
