"""The limits of SECURITY.md: an image just at each one is used, one just over it is refused with the
file and what is wrong with it, and neither takes memory that the limit does not allow."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.crafted import BACKING_FORMAT, BITMAPS, CLUSTER, COMPRESSED, COPIED, image

import qcow2x

pytestmark = pytest.mark.not_for_qemu("images at the limits of the format")

ROOT = Path(__file__).resolve().parent.parent
MiB = 1 << 20
#: Where the crafted image ends, which small tables come behind.
END = 8 * CLUSTER
BEHIND = 5 * CLUSTER


# ---- The table and the code ----------------------------------------------------------------------


def defines() -> dict[str, int]:
    """The limits of format.h, as the compiler sees them."""
    text = Path(qcow2x.get_include(), "qcow2x", "format.h").read_text()
    found: dict[str, int] = {}
    for name, value in re.findall(r"^#define (Q2_MAX_\w+) (.+?)(?:/\*.*)?$", text, re.M):
        value = re.sub(r"UINT64_C\((\w+)\)", r"\1", value)
        value = re.sub(r"\b(0x[0-9a-f]+|[0-9]+)u\b", r"\1", value)
        found[name] = eval(value, {}, dict(found))
    return found


def rows() -> list[tuple[str, str, str, str]]:
    table = (ROOT / "SECURITY.md").read_text().split("### Limits")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    split = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines]
    return [row for row in split if not row[0].startswith("---")]  # type: ignore[misc]


def number_of(cell: str) -> int:
    """ "64 MiB", "1,023 bytes", "2^63 - 1 bytes" ..."""
    power = re.match(r"2\^(\d+)( - 1)?", cell)
    if power:
        return int(2 ** int(power[1])) - bool(power[2])
    plain = re.match(r"([\d,]+)( MiB)?", cell)
    assert plain, cell
    return int(plain[1].replace(",", "")) << (20 if plain[2] else 0)


def in_the_code(expression: str) -> int:
    if expression.startswith(("Q2_", "1 <<")):
        return int(eval(expression, {}, defines()))
    module, _, name = f"qcow2x.{expression}".rpartition(".")
    return int(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("what, most, code, beyond", rows(), ids=lambda cell: cell[:40])
def test_the_table_says_what_the_code_does(what: str, most: str, code: str, beyond: str) -> None:
    assert number_of(most) == in_the_code(code.strip("`"))
    for name in re.findall(r"\w+(?:Error|Image)", beyond):
        assert issubclass(getattr(qcow2x, name), qcow2x.Qcow2Error)


def test_every_limit_of_the_format_is_in_the_table() -> None:
    listed = " ".join(code for _, _, code, _ in rows())
    assert [name for name in defines() if name not in listed] == []


def test_what_python_says_again_is_the_same() -> None:
    from qcow2x import _examination, backing, bitmap, encryption, snapshot
    from qcow2x._core import bitmapdir

    d = defines()
    assert backing.MAX_CHAIN_DEPTH == d["Q2_MAX_CHAIN_DEPTH"]
    assert snapshot.MAX_SNAPSHOTS == _examination.MAX_SNAPSHOTS == d["Q2_MAX_SNAPSHOTS"]
    assert snapshot.MAX_TABLE_BYTES == d["Q2_MAX_SNAPSHOT_TABLE_BYTES"]
    assert snapshot.MAX_EXTRA_BYTES == _examination.MAX_SNAPSHOT_EXTRA == d["Q2_MAX_SNAPSHOT_EXTRA"]
    assert snapshot.MAX_L1_BYTES == _examination.MAX_L1_BYTES == d["Q2_MAX_L1_BYTES"]
    assert bitmap.MAX_BITMAPS == _examination.MAX_BITMAPS == d["Q2_MAX_BITMAPS"]
    assert bitmap.MAX_DIRECTORY_BYTES == d["Q2_MAX_BITMAP_DIR_BYTES"]
    assert bitmap.MAX_BITS == 8 * d["Q2_MAX_BITMAP_BYTES"]
    assert bitmapdir.MAX_TABLE_CLUSTER_BYTES == d["Q2_MAX_BITMAP_BYTES"]
    assert bitmapdir.MAX_NAME_BYTES == d["Q2_MAX_BITMAP_NAME"]
    assert _examination.MAX_REFTABLE_BYTES == d["Q2_MAX_RT_BYTES"]
    assert _examination.MAX_EXTENSIONS == d["Q2_MAX_EXTENSIONS"]
    assert _examination.MAX_NAME == d["Q2_MAX_BACKING_NAME"] == d["Q2_MAX_BITMAP_NAME"]
    assert f"{encryption.MAX_ITERATIONS}" == "134217728"


# ---- Images at the limits ------------------------------------------------------------------------


def write(path: Path, raw: bytes, length: int = 0, **patches: bytes) -> None:
    """The image, made ``length`` bytes long by a hole; patches by offset, as ``at_N``."""
    with open(path, "wb") as file:
        file.write(raw)
        file.truncate(max(len(raw), length))
        for name, data in patches.items():
            file.seek(int(name.removeprefix("at_")))
            file.write(data)


def disk_size(path: Path, over: int) -> None:
    # No L1 table can map as much; so at the limit it is that which is wrong.
    write(path, image(cluster_bits=21, size=(1 << 63) - 1 + over))


def mapped_size(path: Path, over: int) -> None:
    cluster = 2 * MiB
    raw = image(cluster_bits=21, size=1 << 61, l1_size=4 << 20, rt_offset=cluster)
    struct.pack_into(">Q", raw, 40, 2 * cluster)
    struct.pack_into(">Q", raw, 24, (1 << 61) + over * cluster)
    write(path, raw, 20 * cluster)


def cluster_size(path: Path, over: int) -> None:
    bits = 21 + over
    raw = image(cluster_bits=bits, rt_offset=1 << bits, l1_offset=2 << bits)
    write(path, raw, 16 << bits)


def refcount_width(path: Path, over: int) -> None:
    write(path, image(refcount_order=6 + over))


def l1_table(path: Path, over: int) -> None:
    write(path, image(l1_offset=END, l1_size=(4 << 20) + over), END + 33 * MiB)


def refcount_table(path: Path, over: int) -> None:
    counted = b"\0\1" * (8 + 128 + over)
    first = struct.pack(">Q", 2 * CLUSTER)
    raw = image(rt_offset=END, rt_clusters=128 + over)
    write(path, raw, END + 9 * MiB, **{f"at_{END}": first, f"at_{2 * CLUSTER}": counted})


def host_offset(path: Path, over: int) -> None:
    write(path, image(l1_offset=(1 << 56) - CLUSTER * (1 - over)))


def extensions(path: Path, over: int) -> None:
    write(path, image([(0x1234, b"")] * (1024 + over)))


def backing_name(path: Path, over: int) -> None:
    write(path, image([(BACKING_FORMAT, b"raw")], b"n" * (1023 + over)))


def backing_format(path: Path, over: int) -> None:
    write(path, image([(BACKING_FORMAT, b"f" * (15 + over))], b"base"))


def snapshot_entry(extra: int = 24, name: int = 0, **fields: int) -> bytes:
    l1_offset, l1_size = fields.get("l1_offset", 3 * CLUSTER), fields.get("l1_size", 1)
    head = struct.pack(">QIHHIIQII", l1_offset, l1_size, 1, name, 0, 0, 0, 0, extra)
    said = struct.pack(">QQQ", 0, 512 * MiB, 0).ljust(extra, b"\0")[:extra]
    entry = head + said + b"1" + bytes(name)
    return entry.ljust(-(-len(entry) // 8) * 8, b"\0")


def snapshot_count(path: Path, over: int) -> None:
    n = 65536 + over
    raw = image(snapshots=n, snapshots_offset=END)
    write(path, raw, **{f"at_{END}": snapshot_entry() * n})


def snapshot_table(path: Path, over: int) -> None:
    # 1024 entries of 64 KiB each, most of them hole.
    name = 65536 - len(snapshot_entry())
    with open(path, "wb") as file:
        file.write(image(snapshots=1024 + over, snapshots_offset=END))
        for n in range(1024 + over):
            file.seek(END + n * 65536)
            file.write(snapshot_entry(name=name)[:80])
        file.truncate(END + 1026 * 65536)


def snapshot_extra(path: Path, over: int) -> None:
    raw = image(snapshots=1, snapshots_offset=END)
    write(path, raw, **{f"at_{END}": snapshot_entry(extra=1024 + over)})


def snapshot_l1(path: Path, over: int) -> None:
    raw = image(snapshots=1, snapshots_offset=END)
    entry = snapshot_entry(l1_offset=END + CLUSTER, l1_size=(4 << 20) + over)
    write(path, raw, END + 34 * MiB, **{f"at_{END}": entry})


def bitmap_entry(
    name: bytes, table_entries: int = 1, granularity: int = 16, extra: int = 0
) -> bytes:
    # Flags: extra data that whoever does not know it may leave alone.
    head = (END + CLUSTER, table_entries, 4, 1, granularity, len(name), extra)
    entry = struct.pack(">QIIBBHI", *head) + bytes(extra) + name
    return entry.ljust(-(-len(entry) // 8) * 8, b"\0")


def with_bitmaps(path: Path, count: int, directory: bytes, **fields: int) -> None:
    at = END + 2 * CLUSTER
    extension = (BITMAPS, struct.pack(">IIQQ", count, 0, len(directory), at))
    raw = image([extension], autoclear=1, **fields)
    write(path, raw, **{f"at_{at}": directory})


def bitmap_count(path: Path, over: int) -> None:
    n = 65535 + over
    with_bitmaps(path, n, b"".join(bitmap_entry(b"%05d" % i) for i in range(n)))


def bitmap_directory(path: Path, over: int) -> None:
    room = 65535 * 1024 - len(bitmap_entry(b"name")) + 8 * over
    with_bitmaps(path, 1, bitmap_entry(b"name", extra=room))


def bitmap_bits(path: Path, over: int) -> None:
    # 2 TiB in bits of 512 bytes each.
    size = (2 << 40) + over * 512
    directory = bitmap_entry(b"name", 8192 + over, granularity=9)
    with_bitmaps(path, 1, directory, size=size, l1_size=4096 + over, l1_offset=END + 3 * CLUSTER)
    os.truncate(path, END + 5 * CLUSTER)


def bitmap_name(path: Path, over: int) -> None:
    with_bitmaps(path, 1, bitmap_entry(b"n" * (1023 + over)))


def chain(path: Path, over: int) -> None:
    below = None
    for n in range(1024 + over - 1, -1, -1):
        made = path if n == 0 else path.with_name(f"layer{n}")
        named = {} if below is None else {"backing_file": below.name, "backing_format": "qcow2"}
        raw = bytearray(4096)
        struct.pack_into(">IIQIIQIIQQI", raw, 0, 0x514649FB, 2, 0, 0, 9, 512, 0, 1, 1024, 512, 1)
        if named:
            struct.pack_into(">II5s", raw, 72, BACKING_FORMAT, 5, b"qcow2")
            name = os.fsencode(below.name)  # type: ignore[union-attr]
            struct.pack_into(">QI", raw, 8, 200, len(name))
            raw[200 : 200 + len(name)] = name
        made.write_bytes(raw)
        below = made


def luks(path: Path) -> tuple[bytearray, int]:
    qcow2x.create(path, MiB, encryption=qcow2x.Encryption("key", iter_time_ms=1))
    raw = bytearray(path.read_bytes())
    return raw, raw.index(b"LUKS\xba\xbe\0\1")


def luks_iterations(path: Path, over: int) -> None:
    raw, at = luks(path)
    (digest,) = struct.unpack_from(">I", raw, at + 164)
    struct.pack_into(">I", raw, at + 208 + 4, (1 << 27) - digest + over)
    path.write_bytes(raw)


def luks_key(path: Path, over: int) -> None:
    raw, at = luks(path)
    struct.pack_into(">I", raw, at + 108, 64 + over)
    path.write_bytes(raw)


def decoded(path: Path, over: int) -> None:
    """A cluster of 2 MiB whose stream goes on for another 62 MiB of them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    stream = packer.compress(b"A" * (2 + 62 * over) * MiB) + packer.flush()
    cluster = 2 * MiB
    raw = image(cluster_bits=21, size=cluster, rt_offset=cluster, l1_offset=2 * cluster)
    entry = COMPRESSED | (-(-len(stream) // 512)) << 49 | 4 * cluster
    patches = {
        f"at_{2 * cluster}": struct.pack(">Q", 3 * cluster | COPIED),
        f"at_{3 * cluster}": struct.pack(">Q", entry),
        f"at_{4 * cluster}": stream,
    }
    write(path, raw, 5 * cluster, **patches)


class Limit(NamedTuple):
    make: Callable[[Path, int], None]
    #: What the child does with the image, and the words of its refusal.
    step: str
    words: str
    error: str = "FormatError"
    #: Bytes that it may take.
    room: int = 64 * MiB
    #: What is wrong with the image just at the limit, if something else must be.
    at: str = ""


LIMITS = {
    "disk size": Limit(disk_size, "open", "Image is too big", at="L1 table is too small"),
    "mapped size": Limit(mapped_size, "open", "L1 table is too small"),
    "cluster size": Limit(cluster_size, "open", "Unsupported cluster size"),
    "refcount width": Limit(refcount_width, "open", "may not exceed 64 bits"),
    "L1 table": Limit(l1_table, "open", "Active L1 table too large"),
    "L1 table, to write": Limit(l1_table, "open r+", "Active L1 table too large"),
    "L1 table, inspected": Limit(l1_table, "inspect", "limit-l1-table", "", 8 * MiB),
    "refcount table": Limit(refcount_table, "open", "Reference count table too large"),
    "refcount table, to write": Limit(refcount_table, "write", "Reference count table too large"),
    "host offset": Limit(host_offset, "open", "offset invalid", at="beyond the end of the file"),
    "header extensions": Limit(extensions, "open", "more than 1024 header extensions"),
    "backing name": Limit(backing_name, "open", "Backing file name too long"),
    "backing format": Limit(backing_format, "open", "longer than 15 bytes"),
    "snapshots": Limit(snapshot_count, "snapshots", "Snapshot table too large"),
    "snapshot table": Limit(
        snapshot_table, "snapshots", "Snapshot table is too big", room=192 * MiB
    ),
    "snapshot's extra data": Limit(
        snapshot_extra, "snapshots", "Too much extra metadata in snapshot table entry 0"
    ),
    "snapshot's L1 table": Limit(snapshot_l1, "snapshot", "Snapshot L1 table too large"),
    "bitmaps": Limit(bitmap_count, "bitmaps", "counts 65536 bitmaps"),
    "bitmap directory": Limit(
        bitmap_directory, "bitmaps", "directory has 67107848 bytes", room=208 * MiB
    ),
    "bits": Limit(bitmap_bits, "bits", "misplaced or too large", "CorruptImage"),
    "bitmap's name": Limit(bitmap_name, "bitmaps", "empty, too long", "CorruptImage"),
    "chain": Limit(chain, "chain", "longer than 1024 layers", room=128 * MiB),
    "LUKS iterations": Limit(luks_iterations, "describe", "more than 134217728 iterations"),
    "LUKS key": Limit(luks_key, "describe", "no keys of 65 bytes"),
    # The rest of the stream is not looked at, or found to be too much: either is right.
    "decoded cluster": Limit(decoded, "read", "decode", "CorruptImage|", 16 * MiB),
}

STEPS: dict[str, Callable[[str], Any]] = {
    "open": lambda path: qcow2x.open(path, backing=_no_backing(path)).close(),
    "open r+": lambda path: qcow2x.open(path, "r+", cache="unsafe").close(),
    "write": lambda path: _write(path),
    "inspect": lambda path: _inspect(path),
    "snapshots": lambda path: _with(path, lambda image: list(image.snapshots)),
    "snapshot": lambda path: qcow2x.open(path, snapshot="1").close(),
    "bitmaps": lambda path: _with(path, lambda image: list(image.bitmaps)),
    "bits": lambda path: _with(path, lambda image: list(image.bitmaps.extents("name"))),
    "chain": lambda path: qcow2x.open(path, references="follow").close(),
    "describe": lambda path: _describe(path),
    "read": lambda path: _with(path, lambda image: image.pread(512, MiB)),
}


def _no_backing(path: str) -> bool | None:
    with open(path, "rb") as file:
        return False if any(file.read(16)[8:]) else None


def _with(path: str, look: Callable[[Any], Any]) -> None:
    with qcow2x.open(path) as opened:
        look(opened)


def _write(path: str) -> None:
    with qcow2x.open(path, "r+", cache="unsafe") as opened:
        opened.pwrite(b"x" * 512, 0)


def _inspect(path: str) -> None:
    found = qcow2x.inspect(path)
    if found.limits_exceeded:
        raise ValueError(f"{path}: {found.limits_exceeded[0].code}")


def _describe(path: str) -> None:
    from qcow2x._core.header import Header
    from qcow2x.encryption import describe
    from qcow2x.storage import FileStorage

    with FileStorage(path) as storage:
        header = Header.load(storage.pread, storage.size(), storage.name)
        describe(storage, header)


@pytest.mark.parametrize("over", [0, 1], ids=["at", "over"])
@pytest.mark.parametrize("name", LIMITS)
def test_limit(name: str, over: int, tmp_path: Path) -> None:
    limit = LIMITS[name]
    path = tmp_path / "image"
    limit.make(path, over)
    told = in_child(path, limit.step, limit.room)
    # A sanitizer keeps books of its own.
    assert told["grown"] <= limit.room or "QCOW2X_WATCHED" in os.environ
    if not over and not limit.at:
        assert told["error"] == "", told
        return
    if over and told["error"] not in limit.error.split("|") + ["ValueError"] * (not limit.error):
        raise AssertionError(told)
    if told["error"]:
        assert str(tmp_path) in told["said"]
        assert (limit.words if over else limit.at) in told["said"]


def in_child(path: Path, step: str, room: int) -> dict[str, Any]:
    """One step, in a process that cannot have more than ``room`` bytes of memory for it."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-X", "faulthandler", __file__, path, step, str(room)]
    done = subprocess.run(
        [*map(str, command)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert isinstance(told, dict)
    return told


def _figures() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    parts = (line.split() for line in lines if line.startswith("Vm"))
    return {name.rstrip(":"): int(kib) << 10 for name, kib, _ in parts}


def main() -> None:
    path, step, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # What is imported on first use is here before anybody counts.
    for module in ("bitmap", "encryption", "image", "inspection", "snapshot", "ops.create"):
        importlib.import_module(f"qcow2x.{module}")
    Path("/proc/self/clear_refs").write_text("5")
    before = _figures()
    if "QCOW2X_WATCHED" not in os.environ:
        limit = before["VmSize"] + room
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    told: dict[str, Any] = {"error": "", "said": ""}
    try:
        STEPS[step](path)
    except (qcow2x.Qcow2Error, ValueError, OSError) as exc:
        told = {"error": type(exc).__name__, "said": str(exc)}
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    told["grown"] = _figures()["VmHWM"] - before["VmRSS"]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
