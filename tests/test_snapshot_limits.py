"""Snapshot tables past the limits: what the tools say of them, and what a repair leaves."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
from cli_helpers import qemu, qemu_img, qemu_io, run

import qcow2x
from qcow2x.snapshot import MAX_SNAPSHOTS, MAX_TABLE_BYTES

CLUSTER = 65536
TABLE = 1 << 20
# An entry of the greatest size that there is.
BIG = struct.pack(">QIHH16xII", 0, 0, 0xFFFF, 0xFFFF, 0, 1024)
BIG_BYTES = 40 + 1024 + 2 * 0xFFFF + 2


def peek(path: Path, offset: int, form: str) -> int:
    with open(path, "rb") as image:
        image.seek(offset)
        return int(struct.unpack(form, image.read(struct.calcsize(form)))[0])


def poke(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as image:
        image.seek(offset)
        image.write(data)


def use_clusters(path: Path, start: int, end: int) -> None:
    block = peek(path, peek(path, 48, ">Q"), ">Q")
    for cluster in range(start // CLUSTER, -(-end // CLUSTER)):
        poke(path, block + 2 * cluster, b"\0\1")


def too_much_extra(path: Path) -> None:
    """The last of three entries has 64 KiB of it, and so reaches into a cluster that is free."""
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    for name in ("a", "b", "c"):
        qemu_io(path, f"write -P {ord(name)} 0 64k")
        qemu_img("snapshot", "-c", name, path)
    poke(path, peek(path, 64, ">Q") + 2 * 72 + 36, struct.pack(">I", 65536))


def too_big(path: Path) -> None:
    """One entry more than fits, and a second behind it."""
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    qemu_io(path, "write -P 7 0 64k")
    n = MAX_TABLE_BYTES // BIG_BYTES + 2
    for i in range(n):
        poke(path, TABLE + i * BIG_BYTES, BIG)
    with open(path, "r+b") as image:
        image.truncate(TABLE + n * BIG_BYTES)
    use_clusters(path, TABLE, TABLE + n * BIG_BYTES)
    poke(path, 60, struct.pack(">IQ", n, TABLE))


def too_many(path: Path) -> None:
    """Three more than there may be, of which one has tables of its own."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "64M")
    qemu_io(path, "write -P 7 0 64k")
    n = MAX_SNAPSHOTS + 3
    with open(path, "r+b") as image:
        image.truncate(TABLE + 40 * n)
    l1, l2 = TABLE - 2 * CLUSTER, TABLE - CLUSTER
    poke(path, TABLE + 40 * MAX_SNAPSHOTS, struct.pack(">QI", l1, 1))
    poke(path, l1, struct.pack(">Q", 1 << 63 | l2))
    use_clusters(path, l1, TABLE + 40 * n)
    poke(path, 60, struct.pack(">IQ", n, TABLE))


@pytest.mark.not_for_qemu("damaged")
@pytest.mark.parametrize(
    ("damage", "kept"),
    [(too_much_extra, 3), (too_big, MAX_TABLE_BYTES // BIG_BYTES), (too_many, MAX_SNAPSHOTS)],
)
def test_tools_answer_as_qemu_img(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, kept: int
) -> None:
    image, copy = tmp_path / "bad.qcow2", tmp_path / "copy.qcow2"
    damage(image)
    shutil.copy(image, copy)

    def same(*args: str) -> None:
        known = [arg for arg in args if arg != "--no-journal"]
        theirs = qemu("qemu-img", *known, copy, ok=(0, 1))
        assert run(*args, image) == theirs.returncode
        ours = capsys.readouterr()
        # New tables lie behind all others here.
        assert ours.out.split("Image end")[0] == theirs.stdout.split("Image end")[0]
        told = theirs.stderr.replace("qemu-img: ", "qcow2x: ").replace(str(copy), str(image))
        assert ours.err == told

    same("info")
    same("check")
    before = image.read_bytes()
    same("check", "-r", "leaks")
    assert image.read_bytes() == before
    # qemu-img keeps no journal of a repair.
    if damage is not too_many:
        same("check", "-r", "all", "--no-journal")
        assert peek(copy, 60, ">I") == kept
        same("check")
    else:
        # It would need half a minute.
        assert run("check", "-r", "all", "--no-journal", image) == 0
        told = capsys.readouterr().err
        assert told.startswith("Discarding 3 overhanging snapshots\nLeaked cluster 14 refcount=1")
        assert qcow2x.check(image).clean
    assert peek(image, 60, ">I") == kept
    with qcow2x.open(image) as disk:
        assert len(list(disk.snapshots)) == kept


def test_what_is_kept_of_too_much_extra_data(tmp_path: Path) -> None:
    image = tmp_path / "bad.qcow2"
    too_much_extra(image)
    # The disk itself can be read before.
    with qcow2x.open(image) as disk:
        assert disk.pread(4, 0) == b"cccc"
        with pytest.raises(qcow2x.FormatError, match="entry 2") as caught:
            list(disk.snapshots)
        assert "check -r all" in caught.value.hint
    found = qcow2x.check(image)
    assert found.corruptions == 2 and not found.check_errors
    assert qcow2x.check(image, repair="leaks").findings == found.findings
    fixed = qcow2x.check(image, repair="all")
    assert fixed.clean and fixed.corruptions_fixed >= 2
    for name in ("a", "b"):
        with qcow2x.open(image, snapshot=name) as disk:
            assert disk.pread(4, 0) == name.encode() * 4
    # Where 64 KiB of extra data are said to be, the name comes after them.
    with qcow2x.open(image) as disk:
        assert [len(entry.unknown_extra) for entry in disk.snapshots] == [0, 0, 1000]


@pytest.mark.not_for_qemu("damaged")
def test_dry_run_of_a_repair_says_what_goes(tmp_path: Path, capsys) -> None:
    image = tmp_path / "bad.qcow2"
    too_big(image)
    before = image.read_bytes()
    assert run("check", "-r", "all", "--dry-run", image) == 2
    assert "table is too big (offset" in capsys.readouterr().err
    assert image.read_bytes() == before
    found = qcow2x.check(image)
    assert found.corruptions == 2 and found.findings[0].code == "snapshots-too-big"
