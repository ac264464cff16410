"""Threads of every kind on one image, under ThreadSanitizer: python -m campaigns.race [--seconds N]

Readers, writers, discards, zeros, snapshots, bitmaps, resizes, checks, flushes and a close share one
Image; then a child is forked while they run, and opens the image anew. Each writer has sectors of its
own, so every read of its own is exact. Data races are ThreadSanitizer's to find. It sees nothing of
what the interpreter does inside but its calls of the C library; of its reports count those in which
the core itself makes one of the two accesses.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from campaigns import sanitizer

KIND = "tsan"
SECTOR = 512
CLUSTER = 4096
DISK = 1 << 20
WRITERS = 4
HANG = 300


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m campaigns.race", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args(argv)
    if args.inside:
        return _inside(args)
    python = sanitizer.build(KIND)
    with tempfile.TemporaryDirectory(prefix="qcow2x-race-") as folder:
        told = Path(folder, "told")
        reports = Path(folder, "report")
        status = subprocess.run(
            [python, "-m", "campaigns.race", "--inside", f"--seconds={args.seconds}",
             f"--seed={args.seed}", f"--json={told}"],
            env={**os.environ, "QCOW2X_TSAN": f"log_path={reports}"},
        ).returncode  # fmt: skip
        races = [part for path in sorted(Path(folder).glob("report*")) for part in _reports(path)]
        figures: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {}
    for report in races[:5]:
        print(report, file=sys.stderr)
    figures |= {"races": len(races), "status": status, "seed": args.seed}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    said = ", ".join(f"{value:,} {name}" for name, value in figures.get("operations", {}).items())
    failed = bool(races) or status not in (0, 66) or not figures.get("operations")
    print(f"{figures.get('rounds', 0)} rounds: {said}: {len(races)} races, status {status}")
    return 1 if failed else 0


def _reports(path: Path) -> list[str]:
    parts = path.read_text(errors="replace").split("==================")
    found = [part.strip() for part in parts if "WARNING: ThreadSanitizer" in part]
    return [report for report in found if any(map(_of_the_core, report.split("\n\n")[:2]))]


def _of_the_core(stack: str) -> bool:
    """Whether the innermost function that is not the C library's is one of the core."""
    frames = [line for line in stack.splitlines() if line.lstrip().startswith("#")]
    inner = next((line for line in frames if "libtsan" not in line), "")
    return "_core" in inner


# ---- Under the sanitizer ----


def _inside(args: argparse.Namespace) -> int:
    end = time.monotonic() + args.seconds
    counts: Counter[str] = Counter()
    rounds = 0
    while rounds == 0 or time.monotonic() < end:
        faulthandler.dump_traceback_later(HANG, exit=True)
        with tempfile.TemporaryDirectory(prefix="qcow2x-race-") as folder:
            Round(Path(folder, "disk.qcow2"), args.seed + rounds, counts).run()
        rounds += 1
        args.json.write_text(json.dumps({"rounds": rounds, "operations": counts}))
    faulthandler.cancel_dump_traceback_later()
    return 0


class Round:
    """One image, from its creation to its close, and its threads."""

    def __init__(self, path: Path, seed: int, counts: Counter[str]) -> None:
        import qcow2x

        self.seed = seed
        self.path = path
        self.counts = counts
        self.failures: list[BaseException] = []
        self.stop = threading.Event()
        qcow2x.create(path, DISK, cluster_size=CLUSTER, lazy_refcounts=bool(seed & 1))
        cache = ("unsafe", "writeback", "writethrough")[seed % 3]
        self.image = qcow2x.open(path, "r+", cache=cache, l2_cache_size=1)
        self.image.bitmaps.add("marks", 4096)
        self.models = [bytearray(DISK) for _ in range(WRITERS)]

    def run(self) -> None:
        jobs = [lambda n=n: self.write(n) for n in range(WRITERS)]
        jobs += [self.read, self.read, self.change, self.look]
        threads = [threading.Thread(target=self._guarded, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        time.sleep(1)
        self._fork()
        time.sleep(1)
        if self.seed % 2:
            # Whoever is under way is told so, or ends before.
            self.image.close()
        self.stop.set()
        for thread in threads:
            thread.join()
        self.image.close()
        if self.failures:
            raise self.failures[0]
        self._verify()

    def _guarded(self, job: Any) -> None:
        import qcow2x

        while not self.stop.is_set():
            try:
                job()
            except ValueError as exc:
                if not self.image.closed or "closed" not in str(exc):
                    self.failures.append(exc)
                return
            except qcow2x.UnsupportedFeature:
                # Narrow refcounts, or bitmaps while the disk shrinks: refused, nothing changed.
                continue
            except BaseException as exc:
                self.failures.append(exc)
                return

    def _count(self, what: str) -> None:
        self.counts[what] += 1

    def write(self, number: int) -> None:
        """Sectors number, number + WRITERS ...: each cluster is shared by all writers."""
        rng = random.Random()
        model = self.models[number]
        for _ in range(50):
            at = (rng.randrange(DISK // SECTOR // WRITERS) * WRITERS + number) * SECTOR
            if rng.random() < 0.6:
                data = rng.randbytes(SECTOR)
                self.image.pwrite(data, at)
                self._count("writes")
            elif rng.random() < 0.5:
                data = bytes(SECTOR)
                self.image.write_zeroes(at, SECTOR, unmap=rng.random() < 0.5)
                self._count("zeros")
            else:
                data = bytes(model[at : at + SECTOR])
                if self.image.pread(SECTOR, at) != data:
                    raise AssertionError(f"sector {at:#x} is not what its writer left")
                self._count("reads of one's own")
            model[at : at + SECTOR] = data

    def read(self) -> None:
        at = random.randrange(DISK - 65536)
        self.image.pread(65536, at)
        list(self.image.extents(at, 65536))
        self._count("reads")

    def change(self) -> None:
        snapshots = self.image.snapshots
        made = snapshots.create("now")
        with snapshots.open(made.id) as then:
            then.pread(65536, 0)
        self.image.flush()
        snapshots.delete(made.id)
        self._count("snapshots")
        # Behind what the writers use.
        self.image.discard(0, 0)
        self.image.bitmaps.clear("marks")
        self._count("bitmap changes")

    def look(self) -> None:
        self.image.flush()
        list(self.image.bitmaps.extents("marks"))
        self.image.stats()
        self.image.info()
        self._count("flushes")

    def _fork(self) -> None:
        """A child opens the image for itself; the parent's is not to be used there."""
        child = os.fork()
        if child == 0:
            status = 1
            with suppress(BaseException):
                import qcow2x

                with qcow2x.open(self.path, lock=False) as image:
                    status = 0 if image.size == DISK else 2
            os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            raise AssertionError(f"the child ended with {status}")
        self._count("forks")

    def _verify(self) -> None:
        import qcow2x

        found = qcow2x.check(self.path)
        if not found.clean:
            raise AssertionError(f"not clean: {list(found.findings)[:3]}")
        with qcow2x.open(self.path) as image:
            disk = image.pread(DISK, 0)
        if self.seed % 2:
            return
        for number, model in enumerate(self.models):
            for at in range(number * SECTOR, DISK, WRITERS * SECTOR):
                if disk[at : at + SECTOR] != model[at : at + SECTOR]:
                    raise AssertionError(f"sector {at:#x} is lost")


if __name__ == "__main__":
    sys.exit(main())
