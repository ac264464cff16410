"""Converting, compressing and decompressing, beside qemu-img convert and cp.

qemu-img convert and cp leave their output to the page cache, so ours does too here (cache="unsafe");
qemu-img's time includes the start of the program, some milliseconds. The disk is a mix of this
machine's own programs, libraries, headers and documents, QCOW2X_BENCH_MIB MiB of them (default 512);
plain copies are made of three times that.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FEW_ROUNDS, ROUNDS
from interpreter import environment
from table import MIB, OURS

import qcow2x
from qcow2x.demo import race

MIXED_MIB = int(os.environ.get("QCOW2X_BENCH_MIB") or 512)
ROOTS = ("/usr/bin", "/usr/lib", "/usr/share", "/usr/include")
BEST = 9
#: Of copies without much work beside them: 0.92 to 2.86 of cp in single rounds, as the disk takes in what is
#: dirty.
COPY_ROUNDS = ROUNDS * 3

CONVERT_AND_TELL = """
import json, sys, qcow2x
qcow2x.convert(sys.argv[1], sys.argv[2], cache="unsafe", **json.loads(sys.argv[3]))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) // 1024)
"""


def mixed_files(path: Path, nbytes: int) -> None:
    """Files of this machine one after the other, each from a block of its own as in a file system; an
    equal share of each root, all over again if they are not enough."""
    with open(path, "wb") as out:
        while out.tell() < nbytes:
            before = out.tell()
            for root in ROOTS:
                share = out.tell() + nbytes // len(ROOTS)
                for name in sorted_files(root):
                    if out.tell() >= min(share, nbytes):
                        break
                    try:
                        data = Path(name).read_bytes()
                    except OSError:
                        continue
                    out.write(data + bytes(-len(data) % 4096))
            if out.tell() == before:
                pytest.skip(f"none of {', '.join(ROOTS)} has files")
        out.truncate(nbytes)


def sorted_files(root: str):
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path):
                yield path


@pytest.fixture(scope="module")
def mixed(folder):
    path = folder / "mixed.raw"
    mixed_files(path, MIXED_MIB * MIB)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def large(folder, mixed):
    """Raw and qcow2, three times the mixed files."""
    raw, image = folder / "large.raw", folder / "large.qcow2"
    with open(raw, "wb") as out:
        for _ in range(3):
            with open(mixed, "rb") as part:
                shutil.copyfileobj(part, out, MIB)
    qcow2x.convert(raw, image, src_format="raw")
    yield raw, image
    raw.unlink()
    image.unlink()


def have_memory(nbytes: int) -> None:
    """Touches so much memory and gives it back, half of what is free at most: in a virtual machine whose host
    takes back what lies free for seconds, who comes first pays for getting it again. Beside a copy
    that is all of the time: cp of 512 MiB took 0.71 s in such memory, else 0.19."""
    page = os.sysconf("SC_PAGESIZE")
    nbytes = min(nbytes, os.sysconf("SC_AVPHYS_PAGES") // 2 * page)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, nbytes, flags=flags).close()


class Contest:
    """Who makes a target out of a source: each starts without a target, with the same memory, and its dirty
    pages are gone before the next begins."""

    #: Beside the target's pages: programs, their buffers, the file system's records.
    MORE_MEMORY = 1024 * MIB

    def __init__(self, source: Path, target: Path, disk_size: int) -> None:
        self.source, self.target, self.disk_size = source, target, disk_size
        self.sizes: dict[str, int] = {}
        self.turn = 0

    def round(self, **subjects) -> dict[str, float]:
        """*subjects* in turn, the first one changing; by their names, ``_`` for a space."""
        names = list(subjects)
        self.turn += 1
        taken: dict[str, float] = {}
        for i in range(len(names)):
            name = names[(i + self.turn) % len(names)]
            self.target.unlink(missing_ok=True)
            race.make_warm(self.source, readahead=True)
            have_memory(self.disk_size + self.MORE_MEMORY)
            start = time.perf_counter()
            subjects[name]()
            taken[name] = time.perf_counter() - start
            self.sizes[name] = self.target.stat().st_size
            # Before the next one's time begins.
            os.sync()
        self.target.unlink()
        return {name: taken[name] for name in names}

    def ours(self, **options):
        return lambda: qcow2x.convert(self.source, self.target, cache="unsafe", **options)

    def run(self, *command: str):
        words = [*command, str(self.source), str(self.target)]
        return lambda: subprocess.run(words, check=True)


def bench_raw_to_qcow2(folder, large, versus):
    contest = Contest(large[0], folder / "out", 3 * MIXED_MIB * MIB)
    subjects = {
        OURS: contest.ours(src_format="raw"),
        "qemu-img": contest.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2"),
        "cp": contest.run("cp", "--reflink=never"),
    }
    versus(
        f"convert raw to qcow2, {3 * MIXED_MIB} MiB cached",
        lambda: contest.round(**subjects),
        tags={"work": "raw to qcow2", "plot": "image"},
        rounds=COPY_ROUNDS,
    )


def bench_qcow2_to_raw(folder, large, versus):
    contest = Contest(large[1], folder / "out", 3 * MIXED_MIB * MIB)
    subjects = {
        OURS: contest.ours(src_format="qcow2", dst_format="raw"),
        "qemu-img": contest.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw"),
        "cp": contest.run("cp", "--reflink=never"),
    }
    versus(
        f"convert qcow2 to raw, {3 * MIXED_MIB} MiB cached",
        lambda: contest.round(**subjects),
        tags={"work": "qcow2 to raw", "plot": "image"},
        rounds=COPY_ROUNDS,
    )


QEMU_COMPRESS = ("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2")


@pytest.mark.parametrize(("level", "most"), [("default", 1.10), ("best", 1.0)])
def bench_compress_zlib(folder, mixed, versus, fact, level, most):
    contest = Contest(mixed, folder / "out", MIXED_MIB * MIB)
    subjects = {
        OURS: contest.ours(
            src_format="raw", compress=True, level=BEST if level == "best" else None
        ),
        "qemu-img -W -m 16": contest.run(*QEMU_COMPRESS, "-W", "-m", "16"),
    }
    name = f"convert -c zlib, {level} level, {MIXED_MIB} MiB of mixed files"
    versus(
        name,
        lambda: contest.round(**subjects),
        tags={"work": "compress", "type": "zlib", "level": level, "plot": "image"},
        rounds=FEW_ROUNDS,
        warm_up=False,
    )
    ratio = contest.sizes[OURS] / contest.sizes["qemu-img -W -m 16"]
    fact(f"{name}: size", f"{ratio:.3f} of qemu-img's", f"at most {most:.2f}", ratio <= most)


def bench_compress_zstd(folder, mixed, versus, fact):
    contest = Contest(mixed, folder / "out", MIXED_MIB * MIB)
    zstd = ("-o", "compression_type=zstd")
    subjects = {
        OURS: contest.ours(src_format="raw", compress=True, compression_type="zstd"),
        "qemu-img": contest.run(*QEMU_COMPRESS, *zstd),
        "qemu-img -W -m 16": contest.run(*QEMU_COMPRESS, *zstd, "-W", "-m", "16"),
    }
    name = f"convert -c zstd, {MIXED_MIB} MiB of mixed files"
    versus(
        name,
        lambda: contest.round(**subjects),
        tags={"work": "compress", "type": "zstd", "plot": "image"},
        rounds=FEW_ROUNDS,
        warm_up=False,
    )
    ratio = contest.sizes[OURS] / contest.sizes["qemu-img"]
    fact(f"{name}: size", f"{ratio:.3f} of qemu-img's", "at most 1.00", ratio <= 1.0)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def bench_decompress(folder, mixed, versus, kind):
    """Of an image that QEMU's encoder made."""
    packed = folder / "packed.qcow2"
    option = f"compression_type={kind}"
    subprocess.run(
        [*QEMU_COMPRESS, "-W", "-m", "16", "-o", option, mixed, packed], check=True
    )  # fmt: skip
    contest = Contest(packed, folder / "out", MIXED_MIB * MIB)
    command = ("qemu-img", "convert", "-f", "qcow2", "-O", "raw")
    subjects = {
        OURS: contest.ours(src_format="qcow2", dst_format="raw"),
        "qemu-img": contest.run(*command),
        "qemu-img -W -m 16": contest.run(*command, "-W", "-m", "16"),
    }
    versus(
        f"compressed ({kind}) to raw, {MIXED_MIB} MiB of mixed files",
        lambda: contest.round(**subjects),
        tags={"work": "decompress", "type": kind, "plot": "image"},
        rounds=COPY_ROUNDS,
    )
    packed.unlink()


@pytest.mark.parametrize("threads", [2, 8])
def bench_convert_memory(benchmark, folder, mixed, fact, threads):
    """The whole process, interpreter included, at the conversions that need most."""

    packed, out = folder / "packed.qcow2", folder / "out"
    qcow2x.convert(mixed, packed, src_format="raw", compress=True, cluster_size=2 * MIB)
    kinds = [
        (mixed, {"src_format": "raw"}),
        (mixed, {"src_format": "raw", "cluster_size": 2 * MIB}),
        (mixed, {"src_format": "raw", "compress": True}),
        (mixed, {"src_format": "raw", "compress": True, "level": BEST, "cluster_size": 2 * MIB}),
        (mixed, {"src_format": "raw", "compress": True, "compression_type": "zstd"}),
        (packed, {"src_format": "qcow2", "dst_format": "raw"}),
    ]
    peaks = []

    def all_kinds() -> None:
        for source, options in kinds:
            words = [str(source), str(out), json.dumps({**options, "threads": threads})]
            told = subprocess.run(
                [sys.executable, "-c", CONVERT_AND_TELL, *words],
                env=environment(),
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            peaks.append(int(told.stdout))

    benchmark.pedantic(all_kinds, rounds=1)
    packed.unlink()
    out.unlink()
    bound = 64 + 4 * threads
    fact(
        f"peak memory of any convert, {threads} workers",
        f"{max(peaks)} MiB",
        f"at most {bound} MiB",
        max(peaks) <= bound,
    )
