"""The driver: see the package."""

from __future__ import annotations

import argparse
import json
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from campaigns import sanitizer
from campaigns.fuzz import CPU_LIMIT, store

#: Seconds without a word from a worker, after which it hangs.
HANG = 400
WRONG = store.FOUND / "wrong"


class Watched:
    """A worker, and its successors if it dies."""

    def __init__(self, python: Path, folder: Path, seed: int) -> None:
        self.python = python
        self.folder = folder
        self.seed = seed
        self.covered: dict[str, int] = {}
        self.before: dict[str, int] = {}
        self.heard = time.monotonic()
        self.start()

    def start(self, *words: str) -> None:
        self.folder.mkdir(exist_ok=True)
        self.before = self._sum()
        self.covered = {}
        self.log = open(self.folder / "log", "w+b")
        self.process = subprocess.Popen(
            [self.python, "-m", "campaigns.fuzz", f"--worker={self.folder}", f"--seed={self.seed}"],
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        self.heard = time.monotonic()

    def _sum(self) -> dict[str, int]:
        """Executions add up over successors; coverage is the best that one of them had."""
        both = {**self.before, **self.covered}
        for name, value in self.before.items():
            now = self.covered.get(name, 0)
            both[name] = max(value, now) if name in ("edges", "kept") else value + now
        return both

    @property
    def figures(self) -> dict[str, int]:
        return self._sum()

    def hear(self) -> list[str]:
        """One line of the worker; or its end, and the next begins. What was wrong."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.heard = time.monotonic()
        if line:
            told = json.loads(line)
            self.covered = told["covered"]
            return [f"{told['name']}: {what}" for what in told["wrong"]]
        return [self._died("died")]

    def late(self) -> list[str]:
        if time.monotonic() - self.heard < HANG:
            return []
        self.process.kill()
        return [self._died("hung")]

    def _died(self, how: str) -> str:
        status = self.process.wait()
        if status == -signal.SIGPROF:
            how = f"hung: took more than {CPU_LIMIT} s of a processor"
        self.log.seek(0)
        said = self.log.read().decode(errors="replace")
        data = (self.folder / "under-way").read_bytes()
        name = store.name_of(data)
        store.save(WRONG, data)
        (WRONG / f"{name}.log").write_text(said)
        self.stop()
        # Another seed: the same would come to the same end.
        self.seed += 1000
        self.start()
        summary = next((line for line in said.splitlines() if "SUMMARY" in line), said[-500:])
        return f"{name}: {how} (status {status}): {summary}"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()


def search(
    python: Path, *, seconds: float, seed: int, jobs: int
) -> tuple[dict[str, int], list[str]]:
    wrong: list[str] = []
    end = time.monotonic() + seconds
    # Most of an image's time would be the disk's: memory, where there is a folder of it.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="qcow2x-fuzz-", dir=memory) as folder:
        workers = [Watched(python, Path(folder, str(n)), seed + n) for n in range(jobs)]
        try:
            while time.monotonic() < end:
                ready = [w.process.stdout for w in workers if w.process.stdout is not None]
                heard, _, _ = select.select(ready, [], [], 1)
                for worker in workers:
                    found = worker.hear() if worker.process.stdout in heard else worker.late()
                    for what in found:
                        print(what, file=sys.stderr, flush=True)
                    wrong += found
        finally:
            for worker in workers:
                worker.stop()
        figures: dict[str, int] = {}
        for worker in workers:
            for name, value in worker.figures.items():
                old = figures.get(name, 0)
                figures[name] = max(old, value) if name in ("edges", "kept") else old + value
    return figures, wrong


def replay(python: Path, names: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="qcow2x-fuzz-") as folder:
        words = [f"--worker={folder}", *(f"--replay={name}" for name in names)]
        return subprocess.run([python, "-m", "campaigns.fuzz", *words]).returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m campaigns.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--replay", action="append", help="images by name or path, these alone")
    parser.add_argument(
        "--minimise", action="store_true", help="what build/fuzz has found becomes the corpus"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args(argv)
    if args.worker:
        return _work(args)
    python = sanitizer.build("asan")
    if args.replay:
        return replay(python, args.replay)
    if args.minimise:
        with tempfile.TemporaryDirectory(prefix="qcow2x-fuzz-") as folder:
            words = ["-m", "campaigns.fuzz", f"--worker={folder}", "--minimise"]
            return subprocess.run([python, *words]).returncode
    figures, wrong = search(python, seconds=args.seconds, seed=args.seed, jobs=args.jobs)
    if args.json:
        told: dict[str, Any] = {**figures, "wrong": wrong, "seed": args.seed}
        args.json.write_text(json.dumps({**told, "seconds": round(args.seconds)}, indent=1) + "\n")
    said = ", ".join(f"{value:,} {name}" for name, value in figures.items())
    print(f"seed {args.seed}: {said}; {len(wrong)} failed")
    if wrong:
        print("again: python -m campaigns.fuzz --replay build/fuzz/wrong/NAME.image.z")
    return 1 if wrong or not figures.get("executions") else 0


def _work(args: argparse.Namespace) -> int:
    from campaigns.fuzz.worker import Worker

    worker = Worker(args.worker, args.seed)
    if args.minimise:
        return worker.minimise()
    if not args.replay:
        worker.serve()
    failed = 0
    for name in args.replay:
        for what in worker.execute(store.load(name), keep=False)[0]:
            print(f"{name}: {what}")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
