"""Random operations on disks of every shape, beside a bytearray: python -m campaigns.soak
[--seconds N | --operations N] [--seed N]

One run is one disk's life: some hundred operations (tests/support/disk.py has them) with new layers,
snapshots, bitmaps, resizes, encryption, threads and reopening, a look at the whole disk now and then,
and at its end ``qemu-img check`` and ``compare``. What a run does follows from its seed, so one that
fails is run again with --runs 1 --seed. Prints what was covered; ends with status 1 if a run failed.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import random
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.disk import Disk, operations

#: Operations of one run.
LENGTH = 400
#: A run that takes longer hangs; every thread's stack is shown then.
HANG = 600
#: How often the guest's own requests come for each other operation.
OFTEN = {
    "write": 6,
    "write_many": 2,
    "fill": 3,
    "write_compressed": 3,
    "discard": 3,
    "write_zeroes": 3,
    "read": 4,
}
#: What costs as much as a hundred writes.
SELDOM = {
    "check": 0.3,
    "overlay": 0.15,
    "reopen": 0.5,
    "read_all": 0.5,
    "together": 0.5,
    "amend": 0.2,
}


@dataclass
class Covered:
    """What runs came to."""

    runs: int = 0
    operations: int = 0
    by_name: collections.Counter[str] = field(default_factory=collections.Counter)
    #: Of the images that the runs opened.
    shapes: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Covered) -> None:
        self.runs += other.runs
        self.operations += other.operations
        self.by_name += other.by_name
        self.shapes += other.shapes
        self.failures += other.failures


class Draw:
    """Choices that a seed makes."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def one_of(self, values: Sequence[Any]) -> Any:
        return self._rng.choice(values)

    def integer(self, least: int, most: int) -> int:
        return self._rng.randint(least, most)


def run(seed: int, length: int = LENGTH, told: bool = False) -> Covered:
    covered = Covered(runs=1)
    draw = Draw(random.Random(f"soak {seed}"))
    disk = Disk()
    step = 0
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        try:
            how = Disk.begin.operation.draw(draw)  # type: ignore[attr-defined]
            if told:
                print(f"begin {how}", flush=True)
            disk.begin(**how)
            _note(covered, disk, how)
            for step in range(1, length + 1):
                _one(disk, draw, covered, step if told else None)
        finally:
            disk.end()
    except Exception as exc:
        where = traceback.extract_tb(exc.__traceback__)[-1]
        covered.failures.append(
            f"seed {seed}, operation {step}: {type(exc).__name__}: {exc} ({where.name}, line "
            f"{where.lineno} of {Path(where.filename).name})\n  again: python -m campaigns.soak "
            f"--runs 1 --length {length} --seed {seed} --trace"
        )
    finally:
        faulthandler.cancel_dump_traceback_later()
    return covered


_OPERATIONS = operations()
_WEIGHTS = {name: OFTEN.get(name) or SELDOM.get(name, 1) for name in _OPERATIONS}


def _one(disk: Disk, draw: Draw, covered: Covered, told: int | None) -> None:
    able = [name for name, operation in _OPERATIONS.items() if operation.when(disk)]
    (name,) = draw._rng.choices(able, [_WEIGHTS[name] for name in able])
    how = _OPERATIONS[name].draw(draw)
    if told is not None:
        print(told, name, how, flush=True)
    getattr(disk, name)(**how)
    disk.memory_is_bounded()
    covered.operations += 1
    covered.by_name[name] += 1
    if name in ("overlay", "reopen"):
        _note(covered, disk, how)


def _note(covered: Covered, disk: Disk, how: dict[str, Any]) -> None:
    """What an image is, as it is opened."""
    shape = disk.shape
    extras = {
        "version 2": shape.compat == "0.10",
        "extended L2": shape.extended_l2 and shape.compat != "0.10",
        "zstd": shape.compression == "zstd" and shape.compat != "0.10",
        "lazy refcounts": shape.lazy and shape.compat != "0.10",
        "data file": disk.external,
        f"{len(disk.layers)} layers below": True,
        "snapshots": bool(disk.held),
        "bitmaps": bool(disk.marked),
        f"cache mode {how['cache']}": True,
        f"growth {how['growth']}": True,
        f"encryption {disk.cipher}": disk.cipher is not None,
        f"refcounts of {shape.refcount_bits} bits": shape.compat != "0.10",
        f"clusters of {shape.cluster_size}": True,
    }
    covered.shapes.update(name for name, there in extras.items() if there)


def soak(*, seconds: float, total: int, runs: int, seed: int, length: int, jobs: int) -> Covered:
    """Runs, from ``seed`` on, until the time is over or there were enough."""
    covered = Covered()
    end = time.monotonic() + seconds
    turn = 0
    with ProcessPoolExecutor(jobs) as pool:
        under_way = set()
        while True:
            while (
                len(under_way) < 2 * jobs
                and turn < runs
                and covered.operations < total
                and time.monotonic() < end
            ):
                under_way.add(pool.submit(run, seed + turn, length))
                turn += 1
            if not under_way:
                return covered
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                covered.add(future.result())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m campaigns.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after so long")
    parser.add_argument("--operations", type=int, default=10**15, help="stop after so many")
    parser.add_argument("--runs", type=int, default=10**15, help="stop after so many")
    parser.add_argument("--length", type=int, default=LENGTH, help="operations of one run")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next adds one")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--trace", action="store_true", help="one run; says what it does")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    if args.trace:
        covered = run(args.seed, args.length, told=True)
    else:
        covered = soak(
            seconds=args.seconds,
            total=args.operations,
            runs=args.runs,
            seed=args.seed,
            length=args.length,
            jobs=args.jobs,
        )
    for title, counts in (("operations", covered.by_name), ("images", covered.shapes)):
        said = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
        print(f"{title}: {said}")
    for failure in covered.failures:
        print(failure, file=sys.stderr)
    if args.json:
        figures = {**vars(covered), "seed": args.seed}
        figures["seconds"] = round(time.monotonic() - begun)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    failed = len(covered.failures)
    print(
        f"seeds {args.seed} to {args.seed + covered.runs - 1}: {covered.operations:,} operations in "
        f"{covered.runs:,} runs: {covered.runs - failed} passed, {failed} failed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
