"""QEMU's own image fuzzer against our programs, under sanitizers: python -m campaigns.fuzz.qemu
[--seconds N | --images N] [--seed N] [--source DIR]

The fuzzer (tests/image-fuzzer in QEMU's source; fetched, as QEMU's tests are) makes images of which
a part of the fields is damaged, and runs qemu-img and qemu-io on each, which are ours here. It asks
for a death by a signal only; wrong here is also a traceback, an exit status that no command has, a
command that does not end and one that takes more memory than the image can need. Which image is made
follows from its seed alone. Prints what was run; ends with status 1 if something was wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from campaigns import sanitizer

FETCHER = Path(__file__).resolve().parents[2] / "iotests"
FOUND = sanitizer.SOURCE / "build" / "fuzz" / "qemu"

#: Seconds of a processor that a command may take, and of the clock, if it sleeps.
CPU_LIMIT = 120
HANG = 600
#: Bytes that a command may hold: the fuzzer's disks are at most 10 MiB, the rest is the sanitizer's.
MEMORY = 768 << 20
#: Bytes of one file: a damaged table may say that the same cluster is there a million times.
FILE_SIZE = 1 << 30

#: What is damaged. With the header most images are refused at once, so it stays whole in most.
PARTS: tuple[list[list[str]] | None, ...] = (
    None,
    [["l1_table"], ["l2_tables"]],
    [["refcount_table"], ["refcount_blocks"]],
    [["l1_table"], ["l2_tables"], ["refcount_table"], ["refcount_blocks"]],
    [["feature_name_table"], ["end_of_extension_area"], ["backing_file_format"]],
    [["header", "l1_size"], ["header", "refcount_table_clusters"], ["l2_tables"]],
    [["header", "size"]],
    [["header", "nb_snapshots"], ["header", "snapshots_offset"]],
    [["header", "backing_file_offset"], ["header", "backing_file_size"]],
    [["header"]],
)

#: Besides the fuzzer's own list: what it does not know of, and what changes tables.
MORE = [
    ["qemu-img", "check", "-r", "all", "-f", "qcow2", "$test_img"],
    ["qemu-img", "check", "-r", "leaks", "-f", "qcow2", "--output=json", "$test_img"],
    ["qemu-img", "map", "-f", "qcow2", "--output=json", "$test_img"],
    ["qemu-img", "measure", "-f", "qcow2", "-O", "qcow2", "$test_img"],
    ["qemu-img", "snapshot", "-c", "new", "$test_img"],
    ["qemu-img", "snapshot", "-l", "$test_img"],
    ["qemu-img", "bitmap", "--add", "-f", "qcow2", "$test_img", "new"],
    ["qemu-img", "amend", "-f", "qcow2", "-o", "compat=1.1,refcount_bits=32", "$test_img"],
    ["qemu-img", "resize", "-f", "qcow2", "$test_img", "+1M"],
    ["qemu-img", "rebase", "-f", "qcow2", "-b", "", "$test_img"],
    ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "-c", "$test_img", "smaller.qcow2"],
    ["qemu-io", "$test_img", "-c", "write -z -u $off $len", "-c", "write $off $len", "-c", "map"],
]  # fmt: skip


def wrong_with(command: list[str], status: int, said: str, nbytes: int) -> str:
    """What an end of a command must not be, in a word or two; empty if all is well. ``status`` is
    negative for a signal, ``nbytes`` the most memory that it held."""
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    if "Traceback (most recent call last)" in said:
        return "a traceback"
    # check: 1 could not be done, 2 corruptions, 3 leaks.
    known = (0, 1, 2, 3) if command[1:2] == ["check"] else (0, 1)
    if status not in known:
        return f"exit status {status}"
    if nbytes > MEMORY:
        return f"{nbytes >> 20} MiB of memory"
    return ""


class Watch:
    """Runs our programs in place of processes of QEMU's. Each runs in a child of this process, which
    has all of it loaded: most of a command's time would be the start of an interpreter."""

    def __init__(self) -> None:
        import qcow2x
        from qcow2x.cli import img
        from qcow2x.cli import io as qemu_io

        for module in pkgutil.walk_packages(qcow2x.__path__, "qcow2x."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        # What is there before the first child is everybody's: no collection is to copy it.
        gc.freeze()
        self.programs = {"qemu-img": img.main, "qemu-io": qemu_io.main}
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def run_app(self, log: Any, words: list[str]) -> int:
        """As the fuzzer's function of this name: writes what was said to ``log``, and returns the
        status, -6 for whatever was wrong."""
        with tempfile.TemporaryFile() as out:
            status, nbytes = self._in_a_child(words, out.fileno())
            out.seek(0)
            said = out.read().decode(errors="replace")
        log.write(said)
        self.counts[f"{words[0]} {words[1] if words[0] == 'qemu-img' else _request(words)}"] += 1
        what = wrong_with(words, status, said, nbytes)
        if not what:
            return status
        log.write(f"\n{what}\n")
        self.wrong.append(f"{what}: {' '.join(words)}: {said.strip()[-300:]}")
        return -signal.SIGABRT

    def _in_a_child(self, words: list[str], out: int) -> tuple[int, int]:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._be(words, out)
        handle = os.pidfd_open(child)
        try:
            if not select.select([handle], [], [], HANG)[0]:
                os.kill(child, signal.SIGKILL)
        finally:
            os.close(handle)
        _, status, used = os.wait4(child, 0)
        return os.waitstatus_to_exitcode(status), used.ru_maxrss << 10

    def _be(self, words: list[str], out: int) -> None:
        """Never returns."""
        status = 70
        try:
            with open(os.devnull) as nothing:
                os.dup2(nothing.fileno(), 0)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
            status = self.programs[words[0]](words[1:])
            sys.stdout.flush()
        except SystemExit as exc:
            status = exc.code if isinstance(exc.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)


def _request(words: list[str]) -> str:
    return words[words.index("-c") + 1].split()[0]


class _Random:
    """The module, but that a sample may be of a set, as it could before Python 3.11."""

    def __getattr__(self, name: str) -> Any:
        return getattr(random, name)

    def sample(self, population: Collection[Any], k: int) -> list[Any]:
        return random.sample(population if isinstance(population, range) else sorted(population), k)


def load(source: Path, watch: Watch) -> Any:
    """The fuzzer's class of one test, which runs our programs."""
    fuzzer = source / "tests" / "image-fuzzer"
    if not (fuzzer / "runner.py").is_file():
        raise SystemExit(f"{source} is no source tree of QEMU: it has no tests/image-fuzzer")
    sys.path.insert(0, str(fuzzer))
    runner = importlib.import_module("runner")
    runner.image_generator = importlib.import_module("qcow2")  # type: ignore[attr-defined]
    runner.run_app = watch.run_app  # type: ignore[attr-defined]
    layout = importlib.import_module("qcow2.layout")
    layout.random = _Random()  # type: ignore[attr-defined]
    # The guest's bytes follow from the seed as well.
    layout.urandom = random.randbytes  # type: ignore[attr-defined]

    class Test(runner.TestEnv):  # type: ignore[name-defined,misc]
        def _create_backing_file(self) -> tuple[str, str]:
            """Of a format that our programs make; the fuzzer's own cannot go on without one."""
            fmt = random.choice(("raw", "qcow2", "file"))
            name, nbytes = f"backing_img.{fmt}", random.randint(1, 10) << 20
            if watch.run_app(self.log, ["qemu-img", "create", "-f", fmt, name, str(nbytes)]):
                raise runner.TestException
            return name, fmt

    return Test


def inside(args: argparse.Namespace) -> int:
    """The part that runs under the sanitizers."""
    # Neither program's name from the environment: they are the keys of Watch.programs.
    os.environ.update(QEMU_IMG="qemu-img", QEMU_IO="qemu-io")
    watch = Watch()
    test = load(args.source, watch)
    end = time.monotonic() + args.seconds
    images = 0
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="qcow2x-fuzz-", dir=memory) as folder:
        while images < args.images and time.monotonic() < end:
            known = len(watch.wrong)
            seed = args.seed + images
            one(test, folder, seed)
            for what in watch.wrong[known:]:
                print(f"seed {seed}: {what}", file=sys.stderr, flush=True)
            watch.wrong[known:] = [f"seed {seed}: {what}" for what in watch.wrong[known:]]
            images += 1
            figures = {"images": images, "commands": dict(watch.counts), "wrong": watch.wrong}
            args.json.write_text(json.dumps(figures))
    return 1 if watch.wrong else 0


def one(test: Any, folder: str, seed: int) -> None:
    """One image of the fuzzer's and all commands on it. If one was wrong, image and log are kept."""
    here = str(seed)
    # The fuzzer says on standard error what we say better.
    with contextlib.redirect_stderr(io.StringIO()):
        run = test(here, str(seed), folder, os.path.join(folder, "run.log"), cleanup=False)
        try:
            run.execute(run.commands + MORE, PARTS[seed % len(PARTS)])
        finally:
            run.finish()
    if run.failed:
        shutil.rmtree(FOUND / here, ignore_errors=True)
        shutil.copytree(run.current_dir, FOUND / here)
    shutil.rmtree(run.current_dir)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m campaigns.fuzz.qemu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no image after so long")
    parser.add_argument("--images", type=int, default=10**15, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next adds one")
    parser.add_argument("--source", type=Path, help="QEMU's source tree (default: fetched)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args(argv)
    if args.inside:
        return inside(args)
    sys.path.insert(0, str(FETCHER))
    from fetch import FetchError, fetch

    try:
        source = (args.source or fetch()).resolve()
    except FetchError as exc:
        print(exc, file=sys.stderr)
        return 1
    python = sanitizer.build("asan")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qcow2x-fuzz-") as folder:
        told = Path(folder, "told.json")
        status = subprocess.run(
            [python, "-m", "campaigns.fuzz.qemu", "--inside", f"--source={source}",
             f"--seconds={args.seconds}", f"--images={args.images}", f"--seed={args.seed}",
             f"--json={told}"]
        ).returncode  # fmt: skip
        figures: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {}
    figures |= {"seed": args.seed, "seconds": round(time.monotonic() - begun), "status": status}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    images, counts = figures.get("images", 0), figures.get("commands", {})
    print(", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())))
    print(
        f"seeds {args.seed} to {args.seed + images - 1}: {images:,} images, "
        f"{sum(counts.values()):,} commands; {len(figures.get('wrong', ()))} failed"
    )
    if status:
        print(f"images and logs: {FOUND}; again: --images 1 --seed N")
    return 1 if status or not counts else 0


if __name__ == "__main__":
    sys.exit(main())
