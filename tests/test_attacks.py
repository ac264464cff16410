"""Published attacks by image files: each is named by inspect, refused or defused by open, and opens
nothing on the way but the image itself."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from contextlib import suppress

import pytest
from cli_helpers import MIB, qemu_img
from support.crafted import (
    BACKING_FORMAT,
    BITMAPS,
    CLUSTER,
    COMPRESSED,
    COPIED,
    DATA_FILE,
    FEATURES,
    codes,
    grave,
    image,
    only_opens,
    told_alike,
)

import qcow2x
from qcow2x import FormatError, Qcow2Error, ReferenceDenied
from qcow2x.inspection import READ_LIMIT

pytestmark = pytest.mark.not_for_qemu("hostile images")


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Everything that is imported on first use is imported before anybody counts."""
    path = tmp_path_factory.mktemp("warm") / "disk"
    qcow2x.create(path, MIB)
    qcow2x.inspect(path)
    qcow2x.open(path).close()


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
    opens = False
    tracemalloc.start()
    try:
        with only_opens(disk):
            found = qcow2x.inspect(disk)
        with only_opens(disk), pytest.raises(Qcow2Error), qcow2x.open(disk) as opened:
            # The disk can be read without the snapshots.
            assert code == "table-beyond-end"
            opens = True
            list(opened.snapshots)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    assert (found.valid, found.verdict) == (opens, "reject")
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
    with pytest.raises(FormatError, match="too large"):
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
