"""Cuts of power, by the hundred thousand: python -m campaigns.crash [--seconds N | --states N]

Every run of a workload is chosen by the workload's name and a seed, so a failure can be run again
with --workload and --seed. Prints a table and ends with status 1 if a byte was lost.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from campaigns.catalog import WORKLOADS
from campaigns.workloads import Corrupt, Files, Lost

#: Random states in front of each flush, besides those that are enumerated.
SAMPLES = 4
#: Failures of one run that are described; the rest are counted.
DESCRIBED = 3


@dataclass
class Tally:
    """What the runs of one workload came to."""

    runs: int = 0
    states: int = 0
    #: Of a processor, in all.
    seconds: float = 0
    asked_qemu: int = 0
    corruptions: int = 0
    lost: int = 0
    errors: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def failed(self) -> int:
        return self.corruptions + self.lost + self.errors


def run(workload: str, seed: int, qemu_every: int) -> Tally:
    """One run of a workload and every state that a cut of power in it may leave."""
    tally = Tally(runs=1)
    began = time.process_time()
    rng = random.Random(f"{workload} {seed}")
    case = WORKLOADS[workload](rng)
    with tempfile.TemporaryDirectory(prefix="qcow2x-crash-") as folder:
        for state in case.machine.states(rng, SAMPLES):
            tally.states += 1
            try:
                files = case.verify(state)
                if files and qemu_every and rng.randrange(qemu_every) == 0:
                    tally.asked_qemu += 1
                    _ask_qemu(Path(folder), files)
                continue
            except Corrupt as exc:
                tally.corruptions += 1
                what = f"corrupt: {exc}"
            except Lost as exc:
                tally.lost += 1
                what = f"lost: {exc}"
            except Exception as exc:
                tally.errors += 1
                what = f"{type(exc).__name__}: {exc}"
            if len(tally.failures) < DESCRIBED:
                tally.failures.append(
                    f"{workload} ({case.detail}), after {state.happened} of {case.machine.now} "
                    f"calls: {what}\n  again: python -m campaigns.crash "
                    f"--workload '{workload}' --seed {seed}"
                )
    tally.seconds = time.process_time() - began
    return tally


def _ask_qemu(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name in files:
        if name.endswith(".qcow2"):
            # A data file's name counts from the working folder.
            said = subprocess.run(
                ["qemu-img", "check", "--output=json", name],
                cwd=folder,
                capture_output=True,
                text=True,
            )
            # 0: clean, 3: clusters leaked, and nothing worse.
            if said.returncode not in (0, 3):
                raise Corrupt(f"qemu-img check: {said.stderr or said.stdout}")


def search(
    names: list[str], *, seconds: float, states: int, seed: int, jobs: int, qemu_every: int
) -> dict[str, Tally]:
    """Runs of all workloads in turn until there were ``states`` states or ``seconds`` are over."""
    tallies = {name: Tally() for name in names}
    end = time.monotonic() + seconds
    total = turn = 0
    with ProcessPoolExecutor(jobs) as pool:
        under_way: dict[Future[Tally], str] = {}
        while True:
            while len(under_way) < 2 * jobs and total < states and time.monotonic() < end:
                # The one that has tried the least comes next, and what is quick is tried more: a
                # state of one workload may cost a hundred times that of another.
                waiting = collections.Counter(under_way.values())
                name = min(
                    names,
                    key=lambda n: (
                        tallies[n].states * tallies[n].seconds * (1 + waiting[n]) ** 2,
                        waiting[n],
                    ),
                )
                under_way[pool.submit(run, name, seed + turn, qemu_every)] = name
                turn += 1
            if not under_way:
                return tallies
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                tally = future.result()
                tallies[under_way.pop(future)].add(tally)
                total += tally.states


def table(tallies: dict[str, Tally]) -> str:
    """As Markdown."""
    rows = [
        "| workload | runs | crash states | of them asked of qemu-img check | corruptions "
        "| acknowledged bytes lost | errors |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    whole = Tally()
    for name, tally in tallies.items():
        rows.append(_row(name, tally))
        whole.add(tally)
    return "\n".join([*rows, _row("all", whole)])


def _row(name: str, tally: Tally) -> str:
    cells = (
        tally.runs,
        tally.states,
        tally.asked_qemu,
        tally.corruptions,
        tally.lost,
        tally.errors,
    )
    return f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m campaigns.crash", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--states", type=int, default=10**15, help="stop after so many states")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--workload", choices=WORKLOADS, help="one run of this one alone")
    parser.add_argument(
        "--qemu-every", type=int, default=14, help="qemu-img check sees one state in so many"
    )
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args(argv)
    began = time.monotonic()
    if args.workload:
        tallies = {args.workload: run(args.workload, args.seed, args.qemu_every)}
    else:
        tallies = search(
            list(WORKLOADS),
            seconds=args.seconds,
            states=args.states,
            seed=args.seed,
            jobs=args.jobs,
            qemu_every=args.qemu_every,
        )
    print(table(tallies))
    failed = sum(tally.failed for tally in tallies.values())
    for tally in tallies.values():
        for failure in tally.failures:
            print(failure, file=sys.stderr)
    if args.json:
        figures = {
            "seed": args.seed,
            "seconds": round(time.monotonic() - began),
            "workloads": {name: vars(tally) for name, tally in tallies.items()},
        }
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    runs, states = (sum(getattr(t, n) for t in tallies.values()) for n in ("runs", "states"))
    print(
        f"seeds {args.seed} to {args.seed + runs - 1}, {time.monotonic() - began:.0f} s: "
        f"{states - failed} passed, {failed} failed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
