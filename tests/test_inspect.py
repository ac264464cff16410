"""inspect: every valid image passes; every published attack is named, by inspect and by open, and
nothing but the image itself is opened on the way."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cli_helpers import MIB, qemu_img, qemu_io, run, spawn

import qcow2x
from qcow2x import FormatError, Qcow2Error, ReferenceDenied
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


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Everything that is imported on first use is imported before anybody counts."""
    path = tmp_path_factory.mktemp("warm") / "disk"
    qcow2x.create(path, MIB)
    qcow2x.inspect(path)
    qcow2x.open(path).close()


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


# ---- Valid images ----

SECRET = ["--object", "secret,id=key,data=abc"]
MATRIX = {
    "v2": ["compat=0.10"],
    "v2, 512 byte clusters": ["compat=0.10", "cluster_size=512"],
    "512 byte clusters": ["cluster_size=512"],
    "4k clusters": ["cluster_size=4k"],
    "64k clusters": ["cluster_size=64k"],
    "2M clusters": ["cluster_size=2M"],
    "1 bit refcounts": ["refcount_bits=1"],
    "64 bit refcounts": ["refcount_bits=64"],
    "lazy refcounts": ["lazy_refcounts=on"],
    "zstd": ["compression_type=zstd"],
    "extended L2": ["extended_l2=on"],
    "extended L2, 16k": ["extended_l2=on", "cluster_size=16k"],
    "extended L2, 2M, zstd": ["extended_l2=on", "cluster_size=2M", "compression_type=zstd"],
    "metadata laid out": ["preallocation=metadata"],
    "space laid out": ["preallocation=falloc"],
    "LUKS": ["encrypt.format=luks", "encrypt.key-secret=key", "encrypt.iter-time=10"],
}


def create_by_qemu(disk: Path, options: list[str]) -> None:
    """qemu-img create; on a busy machine it fails now and then to measure how long PBKDF2 takes."""
    for attempt in range(10):
        try:
            qemu_img("create", "-q", *SECRET, "-f", "qcow2", "-o", ",".join(options), disk, "40M")
            return
        except AssertionError as exc:
            if "accurate CPU usage" not in str(exc) or attempt == 9:
                raise


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


@pytest.mark.parametrize("options", MATRIX.values(), ids=MATRIX)
def test_every_valid_image_is_ok(options, tmp_path):
    disk = tmp_path / "disk.qcow2"
    create_by_qemu(disk, options)
    luks = any("luks" in option for option in options)
    found = told_alike(disk)
    assert (found.verdict, found.valid, grave(found)) == ("ok", True, set())
    if not luks:
        qemu_io(disk, "write -P 7 0 9M", "write -P 3 20M 100k", "write -z 30M 1M", "discard 2M 1M")
        if "compat=0.10" not in options:
            qemu_img("bitmap", "--add", disk, "changes")
        if "refcount_bits=1" not in options:
            qemu_img("snapshot", "-c", "first", disk)
            qemu_io(disk, "write -P 8 1M 3M")
            qemu_img("snapshot", "-c", "second", disk)
    found = told_alike(disk)
    assert (found.verdict, found.valid, grave(found)) == ("ok", True, set())
    info = json.loads(qemu_img("info", "-U", "--output=json", disk))
    specific = info["format-specific"]["data"]
    assert found.virtual_size == info["virtual-size"]
    assert found.cluster_size == info["cluster-size"]
    assert found.refcount_bits == specific["refcount-bits"]
    assert found.compression_type == specific["compression-type"]
    assert ("extended L2 entries" in found.incompatible_features) == specific.get(
        "extended-l2", False
    )
    assert ("lazy refcounts" in found.compatible_features) == specific.get("lazy-refcounts", False)
    assert found.encryption == ("luks" if luks else None)
    assert found.snapshot_count == len(info.get("snapshots", []))
    assert list(found.bitmaps) == [bitmap["name"] for bitmap in specific.get("bitmaps", [])]
    assert found.bitmap_count == len(found.bitmaps)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_image_is_ok(kind, tmp_path):
    raw, disk = tmp_path / "raw", tmp_path / "disk.qcow2"
    raw.write_bytes(b"".join(random.Random(i).randbytes(2000) * 50 for i in range(60)))
    qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", raw, disk)
    found = told_alike(disk)
    assert (found.verdict, grave(found)) == ("ok", set())


def test_partitioned_disk_inside_is_no_polyglot(tmp_path):
    raw, disk = tmp_path / "raw", tmp_path / "disk.qcow2"
    content = bytearray(MIB)
    content[510:512] = b"\x55\xaa"
    content[512:520] = content[-512:-504] = b"EFI PART"
    content[32769:32774] = b"CD001"
    raw.write_bytes(content)
    for cluster in ("512", "4k", "64k", "2M"):
        qemu_img("convert", "-O", "qcow2", "-o", f"cluster_size={cluster}", raw, disk)
        assert told_alike(disk).verdict == "ok"


@pytest.mark.parametrize("size", ["0", "512", "8T"])
def test_sizes_from_none_to_huge_are_ok(size, tmp_path):
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "disk", size)
    assert told_alike(tmp_path / "disk").verdict == "ok"


def test_images_made_here_are_ok(tmp_path):
    for name, options in {
        "plain": {},
        "extended": {"extended_l2": True},
        "laid-out": {"preallocation": "metadata"},
        "v2": {"compat": "0.10"},
    }.items():
        qcow2x.create(tmp_path / name, 40 * MIB, **options)
        with qcow2x.open(tmp_path / name, "r+") as disk:
            disk.pwrite(b"x" * 100_000, 12_345)
        assert told_alike(tmp_path / name).verdict == "ok"


def test_references_by_a_plain_name_pass_where_they_are_allowed(tmp_path):
    base, disk = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "10M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", disk)
    found = told_alike(disk, allow_references=True)
    assert (found.verdict, found.reasons) == ("ok", ())
    (named,) = found.references
    assert (named.kind, named.name, named.format, named.flags) == (
        "backing", "base.qcow2", "qcow2", (),
    )  # fmt: skip
    refused = told_alike(disk)
    assert (refused.verdict, refused.valid) == ("reject", True)
    assert "'base.qcow2'" in refused.reasons[0]


@pytest.mark.parametrize("raw", ["on", "off"])
def test_data_file_is_told_like_a_backing_file(raw, tmp_path):
    disk, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    qemu_img(
        "create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw={raw}", disk, "4M"
    )
    found = told_alike(disk)
    assert found.verdict == "reject" and grave(found) == {"data-file"}
    (named,) = found.references
    assert (named.kind, named.name, named.flags) == ("data-file", str(data), ("absolute",))
    assert told_alike(disk, allow_references=True).verdict == "caution"


def test_dirty_and_corrupt_are_a_caution(tmp_path):
    assert qcow2x.inspect(image(incompat=1)).verdict == "caution"
    found = qcow2x.inspect(image(incompat=2))
    assert found.verdict == "caution" and found.valid
    assert found.incompatible_features == ("corrupt bit",)


# ---- Other formats ----

OTHERS = {
    "qcow1": b"QFI\xfb\0\0\0\x01",
    "vmdk": b"KDMV\x01\0\0\0",
    "vhd": b"conectix\0\0\0\x02",
    "vhdx": b"vhdxfile",
    "luks": b"LUKS\xba\xbe\0\x02",
    "qed": b"QED\0",
    "vdi": bytes(64) + b"\x7f\x10\xda\xbe",
    "mbr": bytes(510) + b"\x55\xaa",
    "gpt": bytes(510) + b"\x55\xaaEFI PART",
    "iso9660": bytes(32768) + b"\x01CD001\x01",
    "gzip": b"\x1f\x8b\x08",
    "unknown": b"any raw disk",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named_and_refused(name):
    found = qcow2x.inspect(OTHERS[name].ljust(100_000, b"\0"))
    assert (found.format, found.valid, found.verdict) == (name, False, "reject")
    assert found.virtual_size is None


def test_fixed_vhd_is_known_by_its_footer():
    footer = bytearray(b"conectix".ljust(512, b"\0"))
    footer[64:68] = struct.pack(">I", ~sum(footer) & 0xFFFFFFFF)
    assert qcow2x.inspect(bytes(MIB) + footer).format == "vhd"
    assert qcow2x.inspect(io.BytesIO(bytes(1000) + footer)).format == "vhd"
    assert "polyglot" in codes(qcow2x.inspect(image() + footer))
    # The cookie alone is a guest's to write.
    assert qcow2x.inspect(image() + b"conectix".ljust(512, b"\0")).verdict == "ok"


@pytest.mark.parametrize("nbytes", [0, 1, 3, 4, 7, 8, 20, 71, 111])
def test_any_short_file_gets_an_answer(nbytes):
    found = qcow2x.inspect(bytes(image()[:nbytes]))
    assert (found.valid, found.verdict) == (False, "reject") and found.reasons


# ---- Attacks: names ----

NAMES = {
    "absolute backing": (b"/etc/shadow", {"absolute"}),
    "parent backing": (b"../../secret", {"parent"}),
    "json": (b'json:{"driver":"raw","file":{"filename":"/etc/shadow"}}', {"json"}),
    "json dotted": (b'json:{"file.filename":"/etc/shadow"}', {"json"}),
    "nbd": (b"nbd://10.0.0.1/disk", {"protocol"}),
    "nbd unix": (b"nbd+unix:///x?socket=/run/s", {"protocol"}),
    "file": (b"file:/etc/passwd", {"protocol", "absolute"}),
    "fat": (b"fat:rw:/etc", {"protocol"}),
    "device": (b"/dev/sda", {"absolute", "device"}),
    "device by a detour": (b"//x/../dev/./sda", {"absolute", "device", "parent"}),
    "process memory": (b"/proc/self/mem", {"absolute", "device"}),
    "host device": (b"host_device:/dev/sda", {"protocol", "absolute", "device"}),
    "terminal": (b"a\x1b[2Jb", {"unprintable"}),
}


@pytest.mark.parametrize("name, flags", NAMES.values(), ids=NAMES)
def test_backing_file_disclosure(name, flags, tmp_path):
    """CVE-2024-32498 and its kin: an uploaded image that names a file of the host."""
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(image([(BACKING_FORMAT, b"raw")], name))
    found = told_alike(disk)
    assert (found.valid, found.verdict, grave(found)) == (True, "reject", {"backing"})
    (named,) = found.references
    assert (named.name, set(named.flags)) == (name.decode(), flags)
    assert found.reasons[0].isprintable()
    if flags & {"json", "protocol", "device", "unprintable"}:
        assert qcow2x.inspect(disk, allow_references=True).verdict == "reject"
    else:
        assert qcow2x.inspect(disk, allow_references=True).verdict == "caution"
    with only_opens(disk), pytest.raises(ReferenceDenied):
        qcow2x.open(disk)
    if flags & {"json"} or (flags & {"protocol"} and not name.startswith(b"file:")):
        with only_opens(disk), pytest.raises(ReferenceDenied):
            qcow2x.open(disk, references="follow")


@pytest.mark.parametrize(
    "incompat, name", [(4, b"/etc/passwd"), (4, b'json:{"file.filename":"/etc/passwd"}'), (4, None)]
)
def test_data_file_disclosure(incompat, name, tmp_path):
    """CVE-2024-32498: the external data file of an upload is a file of the host."""
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(image([(DATA_FILE, name)] if name else [], incompat=incompat))
    found = told_alike(disk)
    assert found.verdict == "reject" and "data-file" in grave(found)
    (named,) = found.references
    assert named.kind == "data-file" and named.name == (name or b"").decode()
    with only_opens(disk), pytest.raises(Qcow2Error):
        qcow2x.open(disk).close()


def test_data_file_named_without_its_feature_bit(tmp_path):
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(image([(DATA_FILE, b"/etc/passwd")]))
    assert {"data-file", "unused-data-file"} <= grave(told_alike(disk))
    with only_opens(disk), qcow2x.open(disk) as opened:
        assert opened.pread(512, 0) == bytes(512)


def test_name_that_goes_on_behind_a_nul():
    found = qcow2x.inspect(image([(BACKING_FORMAT, b"raw")], b"base\0/etc/shadow"))
    assert found.references[0].name == "base"
    assert "name-nul" in grave(found)


def test_references_of_a_broken_image_are_told_all_the_same():
    raw = image([(BACKING_FORMAT, b"raw")], b"/etc/shadow", l1_offset=77)
    found = qcow2x.inspect(raw)
    assert not found.valid and found.references[0].name == "/etc/shadow"


def test_name_far_out_in_a_large_first_cluster_is_found(tmp_path):
    raw = bytearray(image(cluster_bits=21, size=0, l1_size=0, l1_offset=0, rt_offset=2 * MIB))
    raw = raw[:112].ljust(4 * MIB, b"\0")
    raw[1_900_000:1_900_011] = b"/etc/shadow"
    struct.pack_into(">QI", raw, 8, 1_900_000, 11)
    with pytest.raises(ReferenceDenied):
        (tmp_path / "disk").write_bytes(raw)
        qcow2x.open(tmp_path / "disk")
    found = qcow2x.inspect(bytes(raw))
    assert found.references[0].name == "/etc/shadow" and found.bytes_read <= READ_LIMIT
    streamed = qcow2x.inspect(io.BytesIO(raw), allow_references=True)
    assert streamed.references[0].flags == ("unseen",) and streamed.verdict == "reject"


def test_extensions_out_of_sight_are_refused():
    raw = bytearray(image(cluster_bits=21, size=0, l1_size=0, l1_offset=0, rt_offset=2 * MIB))
    raw = raw[:112].ljust(4 * MIB, b"\0")
    struct.pack_into(">II", raw, 112, 0x1234, 1_600_000)
    found = qcow2x.inspect(bytes(raw))
    assert found.verdict == "reject" and "extensions-unseen" in grave(found)


# ---- Attacks: formats ----


def test_raw_disk_in_which_the_guest_wrote_a_qcow2_header(tmp_path):
    """A raw base stays raw, whatever its first bytes say, and nothing it names is opened."""
    base, disk, secret = tmp_path / "base", tmp_path / "disk.qcow2", tmp_path / "secret"
    secret.write_bytes(b"SECRET" * 1000)
    forged = image([(BACKING_FORMAT, b"raw")], os.fsencode(secret))
    base.write_bytes(forged)
    disk.write_bytes(image([(BACKING_FORMAT, b"raw")], b"base"))
    with only_opens(disk, base), qcow2x.open(disk, references="follow") as opened:
        assert opened.pread(len(forged), 0) == forged
    found = qcow2x.inspect(base)
    assert found.verdict == "reject" and found.references[0].name == str(secret)


def test_backing_file_without_a_format_is_not_guessed(tmp_path):
    base, disk = tmp_path / "base", tmp_path / "disk.qcow2"
    base.write_bytes(image([(BACKING_FORMAT, b"raw")], b"/etc/shadow"))
    disk.write_bytes(image([], b"base"))
    found = qcow2x.inspect(disk, allow_references=True)
    assert (found.verdict, grave(found)) == ("caution", {"format-missing"})
    with only_opens(disk), pytest.raises(FormatError, match="none is guessed"):
        qcow2x.open(disk, references="follow")


@pytest.mark.parametrize(
    "name, offset, magic",
    [
        ("iso9660", 32769, b"CD001"),
        ("mbr", 510, b"\x55\xaa"),
        ("gpt", 512, b"EFI PART"),
        ("tar", 257, b"ustar"),
        ("ext", 1080, b"\x53\xef"),
    ],
)
def test_polyglot(name, offset, magic, tmp_path):
    """A file that is qcow2 to one program and something else to the next."""
    disk = tmp_path / "disk.qcow2"
    raw = image()
    raw[offset : offset + len(magic)] = magic
    disk.write_bytes(raw)
    found = told_alike(disk)
    assert found.verdict == "reject" and {"polyglot", "header-slack"} <= grave(found)
    assert found.also_looks_like == (name,) and found.format == "qcow2"
    # What is explicit needs no guess: as qcow2 it is a plain empty disk.
    with only_opens(disk), qcow2x.open(disk) as opened:
        assert opened.pread(100, 0) == bytes(100)


def test_bytes_hidden_in_the_header_cluster():
    raw = image()
    raw[CLUSTER - 5] = 1
    found = qcow2x.inspect(raw)
    assert (found.verdict, grave(found)) == ("caution", {"header-slack"})
    assert found.anomalies[0].offset == CLUSTER - 5


# ---- Attacks: tables ----

HUGE = {
    "L1 of 32 GiB": ({"l1_size": 2**32 - 1}, "limit-l1-table"),
    "L1 over the limit": ({"l1_size": (4 << 20) + 1}, "limit-l1-table"),
    "L1 beyond the end": ({"l1_size": 4 << 20, "size": 1 << 40}, "table-beyond-end"),
    "L1 too small": ({"size": 1 << 50}, "invalid-header"),
    "L1 in the header": ({"l1_offset": 0}, "tables-overlap"),
    "L1 on the refcounts": ({"l1_offset": CLUSTER}, "tables-overlap"),
    "L1 askew": ({"l1_offset": 3 * CLUSTER + 8}, "table-misaligned"),
    "L1 at the end of numbers": ({"l1_offset": 2**64 - CLUSTER}, "table-beyond-end"),
    "refcount table of 256 TiB": ({"rt_clusters": 2**32 - 1}, "limit-refcount-table"),
    "refcount table beyond the end": ({"rt_clusters": 100}, "table-beyond-end"),
    "no refcount table": ({"rt_clusters": 0}, "invalid-header"),
    "snapshots without end": ({"snapshots": 2**32 - 1}, "limit-snapshots"),
    "snapshots beyond the end": (
        {"snapshots": 65536, "snapshots_offset": 6 * CLUSTER}, "table-beyond-end",
    ),
    "snapshots on the L1": (
        {"snapshots": 1, "snapshots_offset": 3 * CLUSTER}, "tables-overlap",
    ),
    "disk of 2^64 bytes": ({"size": 2**64 - 1}, "invalid-header"),
    "refcounts of 2^40 bits": ({"refcount_order": 40}, "invalid-header"),
    "clusters of 2^40 bytes": ({"cluster_bits": 40}, "invalid-header"),
    "clusters of a byte": ({"cluster_bits": 0}, "invalid-header"),
    "header of 4 GiB": ({"header_length": 2**32 - 8}, "invalid-header"),
    "header of no bytes": ({"header_length": 0}, "invalid-header"),
    "header of odd length": ({"header_length": 109}, "invalid-header"),
    "unknown version": ({"version": 4}, "unsupported"),
    "unknown encryption": ({"crypt": 3}, "unsupported"),
    "unknown compression": ({"compression": 9, "incompat": 8}, "unsupported"),
}  # fmt: skip


@pytest.mark.parametrize("fields, code", HUGE.values(), ids=HUGE)
def test_impossible_header(fields, code, tmp_path):
    disk = tmp_path / "disk.qcow2"
    fields = dict(fields)
    header_length = fields.pop("header_length", None)
    raw = image(**fields)
    if header_length is not None:
        struct.pack_into(">I", raw, 100, header_length)
    disk.write_bytes(raw)
    tracemalloc.start()
    try:
        with only_opens(disk):
            found = qcow2x.inspect(disk)
        with only_opens(disk), pytest.raises(Qcow2Error):
            qcow2x.open(disk)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    assert (found.valid, found.verdict) == (False, "reject")
    assert code in grave(found)
    assert bool(found.limits_exceeded) == code.startswith("limit-")


def test_virtual_size_beyond_the_policy(tmp_path):
    qcow2x.create(tmp_path / "disk", 10 << 40)
    found = qcow2x.inspect(tmp_path / "disk", max_virtual_size=1 << 40)
    assert found.verdict == "reject" and found.valid
    assert [item.code for item in found.limits_exceeded] == ["limit-virtual-size"]
    assert qcow2x.inspect(tmp_path / "disk", max_virtual_size=10 << 40).verdict == "ok"


def test_snapshot_of_a_larger_disk_is_beyond_the_policy(tmp_path):
    disk = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, "100G")
    qemu_img("snapshot", "-c", "large", disk)
    qemu_img("resize", "-q", "--shrink", disk, "1G")
    assert qcow2x.inspect(disk, max_virtual_size=100 << 30).verdict == "ok"
    found = qcow2x.inspect(disk, max_virtual_size=50 << 30)
    assert found.verdict == "reject" and found.virtual_size == 1 << 30
    assert "snapshot 1" in found.reasons[0]


def snapshot_entry(l1_offset=6 * CLUSTER, l1_size=1, extra=bytes(24), name=b"n"):
    head = struct.pack(">QIHHIIQII", l1_offset, l1_size, 1, len(name), 0, 0, 0, 0, len(extra))
    entry = head + extra + b"1" + name
    return entry.ljust(len(entry) + 7 & ~7, b"\0")


@pytest.mark.parametrize(
    "entry, code",
    [
        (snapshot_entry(l1_size=2**32 - 1), "limit-l1-table"),
        (snapshot_entry(l1_offset=100 * CLUSTER), "table-beyond-end"),
        (snapshot_entry(l1_offset=3 * CLUSTER), "tables-overlap"),
        (snapshot_entry(l1_offset=0), "tables-overlap"),
        (snapshot_entry(extra=bytes(2000)), "limit-snapshot-extra"),
    ],
)
def test_snapshot_table_of_lies(entry, code):
    raw = image(snapshots=1, snapshots_offset=5 * CLUSTER, data=entry)
    found = qcow2x.inspect(raw)
    assert found.verdict == "reject" and code in grave(found)
    good = image(snapshots=1, snapshots_offset=5 * CLUSTER, data=snapshot_entry())
    assert qcow2x.inspect(good).verdict == "ok"


@pytest.mark.parametrize(
    "entry, code",
    [
        ((6 * CLUSTER, 2**32 - 1, 0, 1, 16, 1, 0), "limit-bitmap-table"),
        ((100 * CLUSTER, 1, 0, 1, 16, 1, 0), "table-beyond-end"),
        ((CLUSTER, 1, 0, 1, 16, 1, 0), "tables-overlap"),
        ((6 * CLUSTER, 1, 0, 1, 200, 1, 0), "bitmap-entry"),
        ((6 * CLUSTER, 1, 0, 9, 16, 1, 0), "bitmap-entry"),
    ],
)
def test_bitmap_directory_of_lies(entry, code):
    directory = struct.pack(">QIIBBHI", *entry) + b"b".ljust(8, b"\0")
    extension = (BITMAPS, struct.pack(">IIQQ", 1, 0, 32, 5 * CLUSTER))
    found = qcow2x.inspect(image([extension], autoclear=1, data=directory))
    assert code in grave(found) and found.bitmap_count == 1


# ---- Attacks: extensions and feature bits ----


def test_extension_that_runs_over_the_cluster(tmp_path):
    raw = image()
    struct.pack_into(">II", raw, 112, 0x1234, 2**32 - 1)
    (tmp_path / "disk").write_bytes(raw)
    found = qcow2x.inspect(raw)
    assert found.verdict == "reject" and grave(found) == {"extension-overrun"}
    with pytest.raises(FormatError, match="longer than"):
        qcow2x.open(tmp_path / "disk")


def test_extensions_without_end(tmp_path):
    raw = image([(0x1234, b"")] * 8000)
    (tmp_path / "disk").write_bytes(raw)
    found = qcow2x.inspect(raw)
    assert found.verdict == "reject" and "limit-extensions" in grave(found)
    assert len(found.anomalies) < 10
    with pytest.raises(FormatError, match="1024"):
        qcow2x.open(tmp_path / "disk")


def test_extension_that_is_there_twice(tmp_path):
    raw = image([(DATA_FILE, b"harmless"), (DATA_FILE, b"/etc/shadow")], incompat=4)
    (tmp_path / "disk").write_bytes(raw)
    assert "extension-twice" in grave(qcow2x.inspect(raw))
    with only_opens(tmp_path / "disk"), pytest.raises(FormatError):
        qcow2x.open(tmp_path / "disk")


def test_unknown_extension_and_ignorable_bits_are_only_noted():
    found = qcow2x.inspect(image([(0x1234, b"data")], compat=1 << 40, autoclear=1 << 41))
    assert (found.verdict, codes(found)) == ("ok", {"unknown-extension", "reserved-bits"})
    assert found.compatible_features == ("unknown bit 40",)


def test_unknown_incompatible_feature_cannot_pass_for_a_known_one(tmp_path):
    names = b"\0\x09" + b"extended L2 entries\x1b[2J".ljust(46, b"\0")
    raw = image([(FEATURES, names)], incompat=1 << 9)
    (tmp_path / "disk").write_bytes(raw)
    found = qcow2x.inspect(raw)
    assert found.verdict == "reject" and grave(found) == {"unknown-feature"}
    assert found.incompatible_features == ("unknown bit 9 ('extended L2 entries\\x1b[2J')",)
    with pytest.raises(qcow2x.UnsupportedFeature):
        qcow2x.open(tmp_path / "disk")


def test_size_of_half_a_sector_is_a_caution():
    assert grave(qcow2x.inspect(image(size=MIB + 100))) == {"size-unaligned"}


# ---- Attacks: bombs ----


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def compressed_entry(offset: int, nbytes: int) -> int:
    sectors = (offset % 512 + nbytes + 511) // 512 - 1
    return COMPRESSED | sectors << 54 | offset


def test_compressed_clusters_that_all_share_one_stream(tmp_path):
    """512 MiB of guest disk out of 300 bytes: named, and read in bounded memory."""
    stream = deflated(b"A" * CLUSTER)
    raw = image(l2=[compressed_entry(5 * CLUSTER, len(stream))] * 8192, data=stream)
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(raw)
    found = told_alike(disk)
    assert (found.verdict, grave(found)) == ("caution", {"shared-compressed-clusters"})
    with qcow2x.open(disk) as opened:
        tracemalloc.start()
        try:
            for offset in range(0, 64 * MIB, 8 * MIB):
                assert opened.pread(CLUSTER, offset) == b"A" * CLUSTER
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        finally:
            tracemalloc.stop()


def test_tables_that_are_used_many_times():
    l1 = [4 * CLUSTER | COPIED] * 100
    found = qcow2x.inspect(image(l1=l1, l1_size=100))
    assert grave(found) == {"shared-l2-tables"}
    found = qcow2x.inspect(image(l2=[5 * CLUSTER] * 100))
    assert grave(found) == {"shared-clusters"}
    assert qcow2x.inspect(image(l2=[5 * CLUSTER, 6 * CLUSTER])).verdict == "ok"


@pytest.mark.parametrize("entry", [100 * CLUSTER | COPIED, 4 * CLUSTER + 512, 0x200])
def test_l2_table_where_none_can_be(entry):
    found = qcow2x.inspect(image(l1=[entry]))
    assert found.verdict == "reject"


def test_upload_that_was_cut_short(tmp_path):
    disk = tmp_path / "disk.qcow2"
    qcow2x.create(disk, 100 * MIB)
    with qcow2x.open(disk, "r+") as opened:
        opened.pwrite(random.Random(1).randbytes(3 * MIB), 0)
    raw = disk.read_bytes()
    assert qcow2x.inspect(raw).verdict == "ok"
    assert "data-beyond-end" in grave(qcow2x.inspect(raw[: 2 * MIB]))
    assert qcow2x.inspect(raw[:200_000]).verdict == "reject"


def test_compressed_stream_that_decodes_to_more_than_a_cluster(tmp_path):
    stream = deflated(bytes(64 * MIB))
    raw = image(l2=[compressed_entry(5 * CLUSTER, len(stream))], data=stream, clusters=16)
    (tmp_path / "disk").write_bytes(raw)
    with qcow2x.open(tmp_path / "disk") as opened:
        tracemalloc.start()
        try:
            with suppress(qcow2x.CorruptImage):
                assert opened.pread(CLUSTER, 0) == bytes(CLUSTER)
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        finally:
            tracemalloc.stop()


def test_zstd_stream_that_asks_for_a_window_of_gigabytes(tmp_path):
    # Magic, a frame header without sizes, window 2^31 bytes, one last block of 64 KiB repeats.
    block = (CLUSTER << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"A"
    stream = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + block
    raw = image(
        l2=[compressed_entry(5 * CLUSTER, len(stream))], data=stream, incompat=8, compression=1
    )
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(raw)
    found = told_alike(disk)
    assert (found.verdict, grave(found)) == ("caution", {"limit-zstd-window"})
    code = (
        "import resource, sys, qcow2x\n"
        "image = qcow2x.open(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    image.pread(65536, 0)\nexcept qcow2x.CorruptImage: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    grown = subprocess.run(
        [sys.executable, "-c", code, disk], env=env, check=True, capture_output=True, text=True
    )
    assert int(grown.stdout) < 64 << 10, "KiB"


# ---- Attacks: loops ----


def test_backing_chain_that_comes_back(tmp_path):
    one, two, own = tmp_path / "one", tmp_path / "two", tmp_path / "own"
    one.write_bytes(image([(BACKING_FORMAT, b"qcow2")], b"two"))
    two.write_bytes(image([(BACKING_FORMAT, b"qcow2")], b"one"))
    own.write_bytes(image([(BACKING_FORMAT, b"qcow2")], b"./own"))
    for path in (one, own):
        with only_opens(path):
            assert len(qcow2x.inspect(path).references) == 1
        with only_opens(one, two, own, f"{tmp_path}/./own"):
            with pytest.raises(qcow2x.CorruptImage, match="its own backing chain"):
                qcow2x.open(path, references="follow")


# ---- Bounds ----


def hostile_images():
    rng = random.Random(5)
    big = bytearray(image(cluster_bits=21, size=0, l1_size=0, l1_offset=0, rt_offset=2 * MIB))
    yield bytes(big).ljust(8 * MIB, b"\xff")
    yield b"QFI\xfb\0\0\0\x03" + b"\xff" * (4 * MIB)
    yield b"QFI\xfb\0\0\0\x03" + rng.randbytes(4 * MIB)
    yield bytes(image([(0x1234, b"")] * 8000)).ljust(4 * MIB, b"\0")
    yield bytes(image([(FEATURES, b"\0\x09" + b"\xff" * 65000)], incompat=2**64 - 32))
    yield bytes(
        image(snapshots=65536, snapshots_offset=8 * CLUSTER, clusters=8).ljust(4 * MIB, b"\1")
    )
    entries = struct.pack(">QIIBBHI", 0, 0, 0, 1, 16, 1, 0) + b"b".ljust(8, b"\0")
    extension = (BITMAPS, struct.pack(">IIQQ", 65535, 0, 65535 * 32, 8 * CLUSTER))
    yield bytes(image([extension], autoclear=1)) + entries * 65535
    for _ in range(300):
        raw = image([(FEATURES, bytes(96)), (BACKING_FORMAT, b"raw")], b"/x", l2=[CLUSTER * 5] * 9)
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(4, 140) if rng.random() < 0.8 else rng.randrange(len(raw))
            raw[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        yield bytes(raw)


def test_any_content_is_answered_within_the_bounds():
    for raw in hostile_images():
        storage, stream = Counting(raw), CountingStream(raw)
        tracemalloc.start()
        try:
            found = qcow2x.inspect(storage)
            streamed = qcow2x.inspect(stream)
            assert tracemalloc.get_traced_memory()[1] < 24 * MIB
        finally:
            tracemalloc.stop()
        assert storage.read_bytes <= READ_LIMIT and stream.read_bytes <= READ_LIMIT
        assert found.bytes_read <= READ_LIMIT
        assert found.verdict in ("ok", "caution", "reject") and (found.valid or found.reasons)
        if found.verdict == "ok":
            assert streamed.verdict == "ok"
        assert len(found.anomalies) < 100


def test_open_takes_what_inspect_takes(tmp_path):
    """Whatever inspect calls valid opens, and what it calls invalid does not."""
    path = tmp_path / "disk"
    judged = set()
    for raw in hostile_images():
        path.write_bytes(raw)
        found = qcow2x.inspect(path)
        judged.add(found.valid)
        with only_opens(path):
            try:
                qcow2x.open(path, backing=False, lock=False).close()
            except (qcow2x.UnsupportedFeature, ReferenceDenied):
                pass
            except Qcow2Error:
                assert not found.valid
            except ValueError:
                assert found.references == ()
            else:
                assert found.valid
    assert judged == {True, False}


def test_sparse_image_of_terabytes_is_read_as_little():
    storage = Counting(image(), size=1 << 42)
    assert qcow2x.inspect(storage).verdict == "ok"
    assert storage.read_bytes <= READ_LIMIT


# ---- Pushing bytes in ----


def test_inspector_follows_an_upload_piece_by_piece():
    raw = bytes(image([(BACKING_FORMAT, b"raw")], b"/etc/shadow")).ljust(3 * MIB, b"\0")
    inspector = qcow2x.Inspector()
    wants = [inspector.feed(raw[at : at + 10_000]) for at in range(0, len(raw), 10_000)]
    assert wants == sorted(wants, reverse=True) and not wants[-1]
    assert wants.index(False) == MIB // 10_000
    assert inspector.result().file_size is None
    found = inspector.result(complete=True)
    assert found.file_size == len(raw)
    assert found.references == qcow2x.inspect(raw).references
    assert found.anomalies == qcow2x.inspect(raw).anomalies


def test_inspector_vouches_for_nothing_before_the_header_cluster_is_there():
    raw = bytes(image())
    for nbytes in (0, 3, 8, 50, 112, 40_000, CLUSTER - 1):
        inspector = qcow2x.Inspector()
        inspector.feed(raw[:nbytes])
        assert inspector.result().verdict == "reject"
    inspector.feed(raw[CLUSTER - 1 :])
    assert inspector.result().verdict == "ok"
    assert inspector.result(complete=True) == qcow2x.inspect(io.BytesIO(raw))


def test_stream_is_left_behind_what_was_read():
    stream = io.BytesIO(bytes(image()).ljust(2 * MIB, b"\0"))
    assert qcow2x.inspect(stream).file_size is None
    assert stream.tell() == READ_LIMIT


def test_stream_of_a_truncated_image_knows_its_end():
    raw = bytes(image())[: 3 * CLUSTER]
    found = qcow2x.inspect(io.BytesIO(raw))
    assert found.file_size == len(raw) and "table-beyond-end" in grave(found)


def test_streams_that_cannot_serve_are_refused():
    with pytest.raises(TypeError, match="binary"):
        qcow2x.inspect(io.StringIO("text"))
    with pytest.raises(TypeError):
        qcow2x.inspect(object())

    class NotReady:
        def read(self, length):
            return None

    with pytest.raises(BlockingIOError):
        qcow2x.inspect(NotReady())


def test_source_that_cannot_be_read_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        qcow2x.inspect(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        qcow2x.inspect(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError):
        qcow2x.inspect(tmp_path / "fifo")


def test_image_inside_an_image(tmp_path):
    disk = tmp_path / "disk.qcow2"
    qcow2x.create(disk, 4 * MIB)
    with qcow2x.open(disk, "r+") as opened:
        opened.pwrite(image(), 0)
        assert qcow2x.inspect(opened).format == "qcow2"
        assert not opened.closed


# ---- Names and the command ----


def test_inspect_is_the_function_however_it_is_imported():
    code = (
        "import qcow2x, qcow2x.inspection\n"
        "try:\n    import qcow2x.inspect\nexcept ImportError: pass\n"
        "import qcow2x.cli.inspect\n"
        "from qcow2x import *\n"
        "assert callable(qcow2x.inspect) and inspect is qcow2x.inspect\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_command_tells_the_verdict_by_its_status(tmp_path, capsys):
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(image())
    assert run("inspect", disk) == 0
    assert "verdict: ok" in capsys.readouterr().out
    disk.write_bytes(image(incompat=2))
    assert run("inspect", disk) == 2
    assert "caution: the image is marked corrupt" in capsys.readouterr().out
    disk.write_bytes(image([(BACKING_FORMAT, b"raw")], b"\x1b[2J\xff/etc/shadow"))
    assert run("inspect", disk) == 1
    out = capsys.readouterr().out
    assert "reject: " in out and "\x1b" not in out
    assert run("inspect", disk, "--output=json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "reject" and told["references"][0]["kind"] == "backing"
    assert told["virtual-size"] == 512 * MIB
    disk.write_bytes(image())
    assert run("inspect", "--max-virtual-size", "1M", disk) == 1
    disk.write_bytes(image([(BACKING_FORMAT, b"raw")], b"base"))
    assert run("inspect", "--allow-references", disk) == 0
    assert run("inspect", tmp_path / "nothing") == 1


def test_command_reads_standard_input(tmp_path):
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(image(incompat=2))
    for path, status, format in ((disk, 2, "qcow2"), ("/dev/null", 1, "unknown")):
        with open(path, "rb") as file:
            with spawn("inspect", "--output=json", "-", stdin=file) as process:
                out, err = process.communicate()
        assert process.returncode == status, err
        assert json.loads(out)["format"] == format
