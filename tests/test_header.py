"""The header cluster: what is accepted, what is refused and how, and what survives a rewrite."""

import os
import struct
import subprocess
import tracemalloc
from contextlib import suppress

import pytest
from support.qemu import patiently

from qcow2x._core.header import FEATURE_NAMES, Header, cluster_size_of, feature_name_table
from qcow2x.errors import CorruptImage, FormatError, UnsupportedFeature

#: Offset and width of each fixed field, from the specification.
FIELDS = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing_offset": (8, 8),
    "backing_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_offset": (40, 8),
    "rt_offset": (48, 8),
    "rt_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    "incompat": (72, 8),
    "compat": (80, 8),
    "autoclear": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
}
BACKING_FORMAT, FEATURES, BITMAPS = 0xE2792ACA, 0x6803F857, 0x23852875
CRYPTO, DATA_FILE, UNKNOWN = 0x0537BE77, 0x44415441, 0x12345678
CLUSTER = 65536
FILE_SIZE = 3 * CLUSTER + 8


def cluster(extensions=None, backing=None, **fields):
    """The first cluster of an empty 64 MiB image with some of its fields changed."""
    out = bytearray(CLUSTER)
    values = {
        "magic": 0x514649FB,
        "version": 3,
        "cluster_bits": 16,
        "size": 64 << 20,
        "l1_size": 1,
        "l1_offset": 3 * CLUSTER,
        "rt_offset": CLUSTER,
        "rt_clusters": 1,
        "refcount_order": 4,
        "header_length": 112,
    } | fields
    for name, value in values.items():
        offset, width = FIELDS[name]
        out[offset : offset + width] = value.to_bytes(width, "big")
    at = values["header_length"]
    for kind, data in extensions or []:
        packed = struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
        out[at : at + len(packed)] = packed
        at += len(packed)
    if backing is not None:
        at += 8
        out[at : at + len(backing)] = backing
        out[8:20] = struct.pack(">QI", at, len(backing))
    return bytes(out)


def parse(**kwargs):
    return Header.parse(cluster(**kwargs), FILE_SIZE, "disk.qcow2")


def load(path):
    with open(path, "rb") as file:
        fd = file.fileno()
        return Header.load(
            lambda length, offset: os.pread(fd, length, offset), os.stat(path).st_size, str(path)
        )


def qemu_create(path, size, **options):
    args = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options:
        args += ["-o", ",".join(f"{name}={value}" for name, value in options.items())]
    subprocess.run([*args, str(path), size], check=True)


BAD_FIELDS = [
    ({"magic": 0x514649FA}, FormatError, "Image is not in qcow2 format"),
    ({"version": 1}, UnsupportedFeature, "versions 2 and 3"),
    ({"version": 4}, UnsupportedFeature, "versions 2 and 3"),
    ({"cluster_bits": 0}, FormatError, "Unsupported cluster size"),
    ({"cluster_bits": 8}, FormatError, "Unsupported cluster size"),
    ({"cluster_bits": 22}, FormatError, "Unsupported cluster size"),
    ({"cluster_bits": 2**32 - 1}, FormatError, "Unsupported cluster size"),
    ({"header_length": 0}, FormatError, "qcow2 header too short"),
    ({"header_length": 108}, FormatError, "multiple of 8"),
    ({"header_length": CLUSTER + 8}, FormatError, "qcow2 header exceeds cluster size"),
    ({"header_length": 2**32 - 8}, FormatError, "qcow2 header exceeds cluster size"),
    ({"size": 1 << 63}, FormatError, "Image is too big"),
    ({"size": 2**64 - 1}, FormatError, "Image is too big"),
    ({"size": 1 << 40}, FormatError, "L1 table is too small"),
    ({"size": 1 << 62}, FormatError, "Image is too big"),
    ({"refcount_order": 7}, FormatError, "entry width too large"),
    ({"refcount_order": 2**32 - 1}, FormatError, "entry width too large"),
    ({"crypt_method": 3}, UnsupportedFeature, "encryption method"),
    ({"crypt_method": 2}, FormatError, "Missing CRYPTO header"),
    ({"l1_size": 0}, FormatError, "L1 table is too small"),
    ({"l1_size": (4 << 20) + 1}, FormatError, "Active L1 table too large"),
    ({"l1_size": 2**32 - 1}, FormatError, "Active L1 table too large"),
    ({"l1_offset": 3 * CLUSTER + 512}, FormatError, "Active L1 table offset invalid"),
    ({"l1_offset": 0}, CorruptImage, "overlaps the header"),
    ({"l1_offset": CLUSTER}, CorruptImage, "overlap"),
    ({"l1_offset": 4 * CLUSTER}, CorruptImage, "L1 table lies beyond the end"),
    ({"l1_offset": 2**64 - CLUSTER}, FormatError, "Active L1 table offset invalid"),
    ({"rt_offset": CLUSTER + 512}, FormatError, "count table offset invalid"),
    ({"rt_offset": 0}, CorruptImage, "overlaps the header"),
    ({"rt_offset": 1 << 56}, FormatError, "Reference count table offset invalid"),
    ({"rt_clusters": 0}, FormatError, "not contain a reference count table"),
    ({"rt_clusters": 3}, CorruptImage, "beyond the end"),
    ({"rt_clusters": 129}, FormatError, "count table too large"),
    ({"rt_clusters": 2**32 - 1}, FormatError, "count table too large"),
    ({"nb_snapshots": 65537}, FormatError, "Snapshot table too large"),
    ({"nb_snapshots": 1, "snapshots_offset": 100}, FormatError, "Snapshot table offset invalid"),
    ({"nb_snapshots": 1}, CorruptImage, "overlaps the header"),
    ({"nb_snapshots": 1, "snapshots_offset": CLUSTER}, CorruptImage, "snapshot table overlaps"),
    ({"incompat": 1 << 3}, FormatError, "bit must not be set"),
    ({"compression_type": 1}, FormatError, "bit must be set"),
    ({"compression_type": 2, "incompat": 1 << 3}, UnsupportedFeature, "compression type"),
    ({"incompat": 1 << 4, "cluster_bits": 13}, FormatError, "at least 16 KiB"),
    ({"autoclear": 1 << 1}, FormatError, "data-file-raw requires a data file"),
    ({"backing_offset": 8, "backing_size": 4}, FormatError, "overlaps the header fields"),
    ({"backing_offset": CLUSTER + 1}, FormatError, "Invalid backing file offset"),
    ({"backing_offset": 2**64 - 1, "backing_size": 4}, FormatError, "Invalid backing file offset"),
    (
        {"backing_offset": CLUSTER - 4, "backing_size": 5},
        FormatError,
        "Backing file name too long",
    ),
    ({"backing_offset": 1024, "backing_size": 1024}, FormatError, "Backing file name too long"),
]


@pytest.mark.parametrize("fields, error, sentence", BAD_FIELDS)
def test_field_out_of_range_is_refused_with_its_reason(fields, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        parse(**fields)
    assert str(caught.value).startswith("disk.qcow2: ")
    assert caught.value.path == "disk.qcow2"


BAD_EXTENSIONS = [
    ([(FEATURES, b""), (FEATURES, b"")], {}, "there twice"),
    ([(BACKING_FORMAT, b"x" * 16)], {}, "backing format name is longer"),
    ([(CRYPTO, bytes(16))], {}, "encryption method is not LUKS"),
    ([(CRYPTO, bytes(15))], {"crypt_method": 2}, "15 bytes instead of 16"),
    ([(CRYPTO, struct.pack(">QQ", 100, 10))], {"crypt_method": 2}, "not aligned"),
    ([(CRYPTO, struct.pack(">QQ", CLUSTER, 1 << 60))], {"crypt_method": 2}, "bytes"),
    ([(CRYPTO, struct.pack(">QQ", CLUSTER, 1 << 40))], {"crypt_method": 2}, "beyond the end"),
    ([(BITMAPS, bytes(23))], {"autoclear": 1}, "23 bytes instead of 24"),
    ([(BITMAPS, struct.pack(">IIQQ", 0, 0, 32, CLUSTER))], {"autoclear": 1}, "counts 0"),
    ([(BITMAPS, struct.pack(">IIQQ", 65536, 0, 32, CLUSTER))], {"autoclear": 1}, "counts 65536"),
    ([(BITMAPS, struct.pack(">IIQQ", 1, 7, 32, CLUSTER))], {"autoclear": 1}, "reserved bits"),
    ([(BITMAPS, struct.pack(">IIQQ", 1, 0, 0, CLUSTER))], {"autoclear": 1}, "has 0 bytes"),
    ([(BITMAPS, struct.pack(">IIQQ", 1, 0, 1 << 40, CLUSTER))], {"autoclear": 1}, "directory has"),
    ([(BITMAPS, struct.pack(">IIQQ", 1, 0, 32, 100))], {"autoclear": 1}, "not aligned"),
    ([(UNKNOWN, b"")] * 1025, {}, "more than 1024 header extensions"),
]


@pytest.mark.parametrize("extensions, fields, sentence", BAD_EXTENSIONS)
def test_bad_extension_is_refused_with_its_reason(extensions, fields, sentence):
    with pytest.raises(FormatError, match=sentence):
        parse(extensions=extensions, **fields)


def test_last_backing_format_counts():
    header = parse(
        extensions=[(BACKING_FORMAT, b"raw"), (UNKNOWN, b""), (BACKING_FORMAT, b"qcow2")]
    )
    assert header.backing_format == "qcow2"
    again = Header.parse(header.encode(), FILE_SIZE)
    assert again.extensions == [(BACKING_FORMAT, b"qcow2"), (UNKNOWN, b"")]


def test_extension_longer_than_the_cluster_is_refused():
    raw = bytearray(cluster())
    raw[112:120] = struct.pack(">II", UNKNOWN, CLUSTER - 120 + 1)
    with pytest.raises(FormatError, match="Header extension too large.* 65416 remain"):
        Header.parse(bytes(raw), FILE_SIZE)


def test_extension_that_reaches_into_the_backing_name_is_refused():
    raw = cluster(extensions=[(UNKNOWN, bytes(40))], backing_offset=128, backing_size=4)
    with pytest.raises(FormatError, match="too large.* 40 bytes, where 8 remain"):
        Header.parse(raw, FILE_SIZE)


def test_extension_cut_off_by_the_backing_name_is_refused():
    with pytest.raises(FormatError, match="cut off"):
        parse(backing_offset=116, backing_size=4)


@pytest.mark.parametrize("nbytes", [0, 1, 4, 71, 100])
def test_file_that_ends_inside_the_header_is_refused(nbytes):
    with pytest.raises(FormatError):
        Header.parse(cluster()[:nbytes], nbytes)


@pytest.mark.parametrize("nbytes", [112, CLUSTER, 2 * CLUSTER - 1, 3 * CLUSTER + 7])
def test_file_cut_before_the_end_of_its_tables_is_refused(nbytes):
    with pytest.raises(CorruptImage, match="beyond the end"):
        Header.parse(cluster(), nbytes)


def test_any_first_cluster_is_answered_in_bounded_memory():
    hostile = [
        cluster(cluster_bits=21, l1_size=0, size=0) + bytes((2 << 20) - CLUSTER),
        cluster(extensions=[(UNKNOWN, b"")] * 8000),
        b"QFI\xfb" + b"\xff" * (2 << 20),
        cluster(extensions=[(FEATURES, b"\0\5" + b"\xff" * 65000)], incompat=~0x1F & (2**64 - 1)),
    ]
    tracemalloc.start()
    try:
        for raw in hostile:
            with suppress(FormatError, CorruptImage):
                Header.parse(raw, FILE_SIZE)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_load_reads_no_more_than_the_first_cluster():
    raw = cluster(cluster_bits=21, size=0, l1_size=0, l1_offset=0, rt_offset=2 << 20)
    asked = []

    def pread(length, offset):
        asked.append((offset, length))
        return raw.ljust(8 << 20, b"\0")[offset : offset + length]

    assert Header.load(pread, 8 << 20).cluster_size == 2 << 20
    assert asked == [(0, 65536), (65536, (2 << 20) - 65536)]


def test_cluster_size_is_told_from_the_first_bytes():
    assert cluster_size_of(cluster(cluster_bits=12)[:112]) == 4096


def test_name_at_the_end_of_the_feature_table_may_be_cut_short():
    header = parse(extensions=[(FEATURES, b"\0\x07time travel")], incompat=1 << 7)
    assert header.unknown_incompat == ["time travel"]


def test_unknown_incompatible_features_are_listed_by_name():
    names = b"\0\x07" + b"time travel".ljust(46, b"\0") + b"\1\x08" + b"other".ljust(46, b"\0")
    header = parse(extensions=[(FEATURES, names)], incompat=(1 << 7) | (1 << 8))
    assert header.unknown_incompat == ["time travel", "unknown incompatible feature bit 8"]
    with pytest.raises(UnsupportedFeature, match="time travel") as caught:
        header.require_supported("disk.qcow2")
    assert caught.value.features == ("time travel", "unknown incompatible feature bit 8")


def test_feature_name_cannot_drive_a_terminal():
    names = b"\0\x07" + b"\x1b[2Jboo".ljust(46, b"\0")
    header = parse(extensions=[(FEATURES, names)], incompat=1 << 7)
    assert header.unknown_incompat == ["\\x1b[2Jboo"]


def test_unknown_compatible_and_autoclear_bits_are_accepted():
    header = parse(compat=1 << 40, autoclear=1 << 41)
    header.require_supported()
    assert header.clear_unknown_autoclear() and header.autoclear_features == 0
    assert not header.clear_unknown_autoclear()
    assert Header.parse(header.encode(), FILE_SIZE).compatible_features == 1 << 40


def test_bitmaps_extension_out_of_date_is_kept_but_not_used():
    header = parse(extensions=[(BITMAPS, bytes(24))])
    assert header.bitmap_directory is None
    assert (BITMAPS, bytes(24)) in Header.parse(header.encode(), FILE_SIZE).extensions


def test_unknown_extensions_and_fields_survive_a_rewrite():
    raw = bytearray(
        cluster(
            header_length=136,
            extensions=[(BACKING_FORMAT, b"raw"), (UNKNOWN, b"one"), (UNKNOWN, b"three4567")],
            backing=b"base.img",
        )
    )
    raw[106:136] = bytes(range(30))
    header = Header.parse(bytes(raw), FILE_SIZE)
    assert (header.backing_file, header.backing_format) == ("base.img", "raw")
    assert header.encode() == bytes(raw)


def test_names_can_be_set_and_dropped():
    header = parse(extensions=[(UNKNOWN, b"one"), (BACKING_FORMAT, b"raw")], backing=b"base.img")
    header.backing_file, header.backing_format = "elsewhere/\udcff.img", "qcow2"
    again = Header.parse(header.encode(), FILE_SIZE)
    assert (again.backing_file, again.backing_format) == ("elsewhere/\udcff.img", "qcow2")
    # Known ones first, as QEMU writes them.
    assert [kind for kind, _ in again.extensions] == [BACKING_FORMAT, UNKNOWN]
    again.backing_file = again.backing_format = None
    bare = Header.parse(again.encode(), FILE_SIZE)
    assert bare.backing_file is None and bare.backing_format is None
    assert bare.extensions == [(UNKNOWN, b"one")]


def test_header_that_does_not_fit_in_a_cluster_is_refused():
    header = Header.new(0, cluster_bits=9, backing_file="x" * 400)
    with pytest.raises(ValueError, match="but a cluster has 512"):
        header.encode()
    header = Header.new(0, backing_file="x" * 1024)
    with pytest.raises(ValueError, match="at most 1023"):
        header.encode()


def test_feature_name_table_names_every_known_bit():
    table = feature_name_table()
    assert len(table) == 48 * len(FEATURE_NAMES)
    assert table[:48] == b"\0\0dirty bit".ljust(48, b"\0")


QEMU_OPTIONS = [
    {},
    {"compat": "0.10"},
    {"compat": "v3", "lazy_refcounts": "on", "compression_type": "zstd"},
    {"cluster_size": 512, "refcount_bits": 1},
    {"cluster_size": 4096, "refcount_bits": 64, "preallocation": "metadata"},
    {"cluster_size": "2M", "refcount_bits": 8, "extended_l2": "on"},
]


@pytest.mark.parametrize("options", QEMU_OPTIONS, ids=str)
@pytest.mark.parametrize("size", ["0", "1M", "3G"])
def test_header_written_by_qemu_encodes_to_the_same_bytes(tmp_path, options, size):
    if size == "3G" and "preallocation" in options:
        size = "300M"
    path = tmp_path / "disk.qcow2"
    qemu_create(path, size, **options)
    header = load(path)
    raw = path.read_bytes()[: header.cluster_size].ljust(header.cluster_size, b"\0")
    assert header.encode() == raw


def test_backing_file_written_by_qemu_is_read(tmp_path):
    qemu_create(tmp_path / "base.qcow2", "1M")
    qemu_create(
        tmp_path / "top.qcow2", "2M", backing_file=tmp_path / "base.qcow2", backing_fmt="qcow2"
    )
    header = load(tmp_path / "top.qcow2")
    assert header.backing_file == str(tmp_path / "base.qcow2")
    assert header.backing_format == "qcow2"
    assert header.size == 2 << 20
    assert header.encode() == (tmp_path / "top.qcow2").read_bytes()[:CLUSTER]


def test_luks_and_data_file_written_by_qemu_are_read(tmp_path):
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=pass"]
    command += ["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"]
    command += [str(tmp_path / "luks.qcow2"), "1M"]
    assert patiently(command).returncode == 0
    header = load(tmp_path / "luks.qcow2")
    assert header.encryption == "luks"
    assert header.crypto_header[0] % CLUSTER == 0 and header.crypto_header[1] > 0
    data = tmp_path / "data.raw"
    qemu_create(tmp_path / "ext.qcow2", "1M", data_file=data, data_file_raw="on")
    header = load(tmp_path / "ext.qcow2")
    assert header.data_file == str(data)
    assert header.has_data_file and header.data_file_raw
