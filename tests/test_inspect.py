"""inspect: every valid image passes, whatever it comes from; every other content gets an answer
within the bounds."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from cli_helpers import MIB, qemu_img, qemu_io, run, spawn
from support.crafted import (
    BACKING_FORMAT,
    BITMAPS,
    CLUSTER,
    FEATURES,
    Counting,
    CountingStream,
    codes,
    grave,
    image,
    only_opens,
    told_alike,
)

import qcow2x
from qcow2x import Qcow2Error, ReferenceDenied
from qcow2x.inspection import READ_LIMIT

pytestmark = pytest.mark.not_for_qemu("hostile and odd images")


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Everything that is imported on first use is imported before anybody counts."""
    path = tmp_path_factory.mktemp("warm") / "disk"
    qcow2x.create(path, MIB)
    qcow2x.inspect(path)
    qcow2x.open(path).close()


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
            except (qcow2x.UnsupportedFeature, ReferenceDenied, qcow2x.KeyRequired):
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
