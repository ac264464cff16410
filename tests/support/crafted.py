"""Images made by hand, byte by byte, and guards around what looks at them."""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import struct
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from cli_helpers import MIB

import qcow2x
from qcow2x.inspection import READ_LIMIT

CLUSTER = 65536
BACKING_FORMAT = 0xE2792ACA
FEATURES = 0x6803F857
BITMAPS = 0x23852875
DATA_FILE = 0x44415441
COPIED, COMPRESSED = 1 << 63, 1 << 62

# ---- What is opened ----

_opened: list[object] | None = None


def _audit(event, args):
    if _opened is not None and event in ("open", "socket.connect", "subprocess.Popen"):
        _opened.append(args[0])


# What opening imports on first use is no file that an image names: it is here before anybody looks.
for _module in ("qcow2x.encryption", "qcow2x._core.luks", "qcow2x._core.crypto", "qcow2x.bitmap"):
    importlib.import_module(_module)
sys.addaudithook(_audit)


def held_open() -> list[str]:
    held = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            held.append(os.readlink(f"/proc/self/fd/{number}"))
    # A closed storage keeps its descriptor's number, but nothing behind it, while it lives.
    return sorted(name for name in held if name != "/")


@contextmanager
def only_opens(*allowed):
    """Fails if a file other than those is opened meanwhile, or one is left open."""
    global _opened
    before = held_open()
    _opened = []
    try:
        yield
    finally:
        opened, _opened = _opened, None
    names = {os.fspath(name) for name in allowed}
    assert [name for name in opened if str(name) not in names] == []
    assert held_open() == before


# ---- Images made by hand ----


def image(extensions=(), backing=None, data=b"", l2=(), l1=None, clusters=8, **fields) -> bytearray:
    """A version 3 image of 64 KiB clusters: header, refcount table, refcount block, L1, L2, data."""
    values = {
        "size": 512 * MIB, "cluster_bits": 16, "crypt": 0, "l1_size": 1, "l1_offset": 3 * CLUSTER,
        "rt_offset": CLUSTER, "rt_clusters": 1, "snapshots": 0, "snapshots_offset": 0,
        "incompat": 0, "compat": 0, "autoclear": 0, "refcount_order": 4, "header_length": 112,
        "compression": 0,
    }  # fmt: skip
    values.update(fields)
    out = bytearray(clusters * CLUSTER)
    v = values
    struct.pack_into(
        ">IIQIIQIIQQIIQQQQIIB", out, 0, 0x514649FB, v["version"] if "version" in v else 3, 0, 0,
        v["cluster_bits"], v["size"], v["crypt"], v["l1_size"], v["l1_offset"], v["rt_offset"],
        v["rt_clusters"], v["snapshots"], v["snapshots_offset"], v["incompat"], v["compat"],
        v["autoclear"], v["refcount_order"], v["header_length"], v["compression"],
    )  # fmt: skip
    at = v["header_length"]
    for kind, payload in extensions:
        struct.pack_into(">II", out, at, kind, len(payload))
        out[at + 8 : at + 8 + len(payload)] = payload
        at += 8 + (len(payload) + 7 & ~7)
    at += 8
    if backing is not None:
        out[at : at + len(backing)] = backing
        struct.pack_into(">QI", out, 8, at, len(backing))
    struct.pack_into(">Q", out, CLUSTER, 2 * CLUSTER)
    struct.pack_into(f">{clusters}H", out, 2 * CLUSTER, *[1] * clusters)
    struct.pack_into(">Q", out, 3 * CLUSTER, 4 * CLUSTER | COPIED)
    for index, entry in enumerate(l1 or ()):
        struct.pack_into(">Q", out, 3 * CLUSTER + 8 * index, entry)
    for index, entry in enumerate(l2):
        struct.pack_into(">Q", out, 4 * CLUSTER + 8 * index, entry)
    out[5 * CLUSTER : 5 * CLUSTER + len(data)] = data
    return out


def codes(found) -> set[str]:
    return {item.code for item in found.anomalies}


def grave(found) -> set[str]:
    return {item.code for item in found.anomalies if item.severity != "note"}


class Counting:
    """Storage that counts what is read of it."""

    def __init__(self, data, size=None):
        self.data, self.total, self.read_bytes = data, size or len(data), 0

    def size(self):
        return self.total

    def pread(self, length, offset):
        self.read_bytes += length
        return bytes(self.data[offset : offset + length]).ljust(
            max(0, min(length, self.total - offset)), b"\0"
        )


class CountingStream:
    def __init__(self, data, step=1 << 30):
        self.file, self.step, self.read_bytes = io.BytesIO(data), step, 0

    def read(self, length):
        data = self.file.read(min(length, self.step))
        self.read_bytes += len(data)
        return data


def told_alike(path: Path, **policy) -> qcow2x.Inspection:
    """The answer for a file, after every other kind of source has given the same."""
    with only_opens(path):
        found = qcow2x.inspect(path, **policy)
    data = path.read_bytes()
    with open(path, "rb") as file, only_opens():
        assert qcow2x.inspect(file.fileno(), **policy) == found
    with qcow2x.FileStorage(path) as storage, only_opens():
        assert qcow2x.inspect(storage, **policy) == found
    with only_opens():
        assert qcow2x.inspect(data, **policy) == found
        assert qcow2x.inspect(memoryview(data), **policy) == found
        counting = Counting(data)
        assert qcow2x.inspect(counting, **policy) == found
        assert counting.read_bytes <= READ_LIMIT
        streamed = qcow2x.inspect(CountingStream(data, step=70_001), **policy)
    sizes = {"file_size": None, "bytes_read": 0, "bitmaps": (), "anomalies": ()}
    assert dataclasses.replace(streamed, **sizes) == dataclasses.replace(found, **sizes)
    return found
