"""Instructions that the paths take which do nothing but compute, counted by valgrind's callgrind: the
same on a busy machine as on an idle one.

    python instructions.py            count, beside the counts of instructions.json; status 1 if one grew
    python instructions.py --update   count, and write instructions.json

Counted is what runs inside one function of the core, so that neither the interpreter nor what else a
call does is in it. Another compiler or C library gives other counts: after a change of those, and after
a change that is worth what it costs, they are written anew and committed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import qcow2x

COMMITTED = Path(__file__).with_name("instructions.json")
#: More than this, in parts of the committed count, is a regression.
MOST_GROWTH = 0.10
KIB = 1 << 10
CLUSTER = 64 * KIB
CORE = "__pyx_f_6qcow2x_5_core_"


def lookup(folder: Path) -> int:
    """Scattered reads of allocated clusters, all tables in memory."""
    qcow2x.create(folder / "disk", 1 << 30, preallocation="metadata")
    return read_scattered(folder / "disk")


def lookup_through_chain(folder: Path) -> int:
    """The same below 20 overlays that hold nothing."""
    qcow2x.create(folder / "0", 1 << 30, preallocation="metadata")
    for n in range(1, 21):
        qcow2x.create(folder / str(n), backing_file=folder / str(n - 1), backing_format="qcow2")
    return read_scattered(folder / "20")


def lookup_of_two(folder: Path) -> int:
    """The same, half of each read in one cluster and half in the next."""
    qcow2x.create(folder / "disk", 1 << 30, preallocation="metadata")
    return read_scattered(folder / "disk", CLUSTER - 256)


def read_scattered(path: Path, skip: int = 0) -> int:
    """Of few enough places that the first visits, which load tables, do not count."""
    count = 8192
    buffer = bytearray(512)
    with qcow2x.open(path, references="follow") as image:
        for i in range(count):
            image.preadinto(buffer, i * 37 % 64 * 512 * KIB + skip)
    return count


def rewrite(folder: Path) -> int:
    """Scattered writes to clusters that are there, as scattered as those reads."""
    count = 8192
    qcow2x.create(folder / "disk", 1 << 30, preallocation="metadata")
    with qcow2x.open(folder / "disk", "r+") as image:
        for i in range(count):
            image.pwrite(b"x" * 512, i * 37 % 64 * 512 * KIB)
    return count


def refcounts(folder: Path) -> int:
    """Clusters handed out one by one: what is free is looked for, refcounts are raised."""
    count = 2048
    qcow2x.create(folder / "disk", 1 << 30)
    with qcow2x.open(folder / "disk", "r+", cache="unsafe") as image:
        for i in range(count):
            image.pwrite(b"x", i * CLUSTER)
    return count


def text(nbytes: int) -> bytes:
    """The same on every machine, and about as compressible as a program."""
    words = [b"%x" % (i * 2654435761 % 99991) for i in range(512)]
    picked = (words[i * i * 40503 % 509] for i in range(nbytes))
    out = bytearray()
    while len(out) < nbytes:
        out += next(picked)
    return bytes(out[:nbytes])


def decode(kind: int) -> int:
    from qcow2x._core import codec

    count = 20
    cluster = text(CLUSTER)
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    packed = (packer.compress(cluster) + packer.flush()) if kind == 0 else codec.encode(1, cluster)
    for _ in range(count):
        assert codec.decode(kind, packed, CLUSTER) == cluster
    return count


def encode(level: int) -> int:
    from qcow2x._core import codec

    for _ in range(4):
        codec.encode(0, text(CLUSTER), level)
    return 4


#: What is counted: in which functions, and what calls them how often.
PATHS = {
    "lookup of two clusters": ("7mapping_plan_range", lookup_of_two),
    "read of a cluster, without the system call's own": ("4read_read_guest", lookup),
    "write to a cluster, without the system call's own": ("5write_write_guest", rewrite),
    "read through 20 layers that hold nothing": ("4read_read_guest", lookup_through_chain),
    "cluster handed out, refcount raised": ("5alloc_alloc_clusters", refcounts),
    "decode of a zlib cluster": ("5codec_decode_cluster", lambda _: decode(0)),
    "decode of a zstd cluster": ("5codec_decode_cluster", lambda _: decode(1)),
    "encode of a zlib cluster, level 1": ("5codec_encode_cluster", lambda _: encode(1)),
    "encode of a zlib cluster, level 9": ("5codec_encode_cluster", lambda _: encode(9)),
}


def counted(name: str, scratch: Path) -> int:
    """Instructions per call of one of PATHS."""
    function = CORE + PATHS[name][0]
    (scratch / "work").mkdir()
    command = [
        "valgrind", "--tool=callgrind", f"--toggle-collect={function}",
        f"--callgrind-out-file={scratch / 'out'}", sys.executable, __file__, "--run", name,
        str(scratch / "work"),
    ]  # fmt: skip
    # Hashes in the same order each time, and no compiled files being written.
    env = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"valgrind failed:\n{done.stderr}")
    collected = re.search(r"Collected : (\d+)", done.stderr)
    calls = int(done.stdout)
    assert collected is not None
    if int(collected[1]) == 0:
        sys.exit(f"nothing was counted in {function}: is the core built without symbols?")
    return round(int(collected[1]) / calls)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--run"]:
        print(PATHS[arguments[1]][1](Path(arguments[2])))
        return 0
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is needed: sudo apt install valgrind")
    before = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    now: dict[str, int] = {}
    grown = []
    print(f"{'instructions per call':<52}{'now':>12}{'committed':>12}")
    for name in PATHS:
        with tempfile.TemporaryDirectory() as scratch:
            now[name] = counted(name, Path(scratch))
        known = before.get(name)
        change = f"{now[name] / known - 1:+.1%}" if known else "new"
        print(f"{name:<52}{now[name]:>12}{known or '-':>12}  {change}", flush=True)
        if known and now[name] > known * (1 + MOST_GROWTH):
            grown.append(name)
    if "--update" in arguments:
        COMMITTED.write_text(json.dumps(now, indent=2) + "\n")
        return 0
    if grown:
        print(f"more than {MOST_GROWTH:.0%} above the committed count: {', '.join(grown)}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
