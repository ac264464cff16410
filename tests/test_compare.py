"""compare(): what two disks read as, against QEMU's own verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import MIB, disk_bytes, qemu, qemu_img, qemu_io, run, write_sparse

from qcow2x.errors import Cancelled
from qcow2x.ops.compare import compare


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_sparse(tmp_path / "disk.raw", disk_bytes())


def test_equal_disks_in_other_formats(raw: Path, tmp_path: Path) -> None:
    for options in (["-c"], [], ["-o", "cluster_size=512"], ["-S", "0"]):
        image = tmp_path / "disk.qcow2"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, image)
        result = compare(raw, image, first_format="raw")
        assert result.identical
        assert result.offset is None


@pytest.mark.parametrize("at", [0, 70_001, 2 * MIB + 300_001, 3 * MIB + 123 * 512 - 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_first_difference(raw: Path, tmp_path: Path, at: int, threads: int) -> None:
    other = bytearray(raw.read_bytes())
    other[at] ^= 0xFF
    other[-1] ^= 0x0F
    (tmp_path / "other.raw").write_bytes(other)
    result = compare(raw, tmp_path / "other.raw", threads=threads)
    assert not result.identical
    assert (result.reason, result.offset) == ("content", at)


def test_through_backing_chains(raw: Path, tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    assert compare(raw, top, references="follow").identical
    qemu_io(top, "write -P 9 1M 1k")
    assert compare(raw, top, references="follow").offset == MIB


def test_sizes_may_differ_by_zeros(raw: Path, tmp_path: Path) -> None:
    longer = write_sparse(tmp_path / "longer.raw", disk_bytes() + bytes(MIB))
    assert compare(raw, longer).identical
    assert compare(longer, raw).identical
    strict = compare(longer, raw, strict=True)
    assert (strict.identical, strict.reason) == (False, "size")
    with open(longer, "r+b") as out:
        out.seek(-1, 2)
        out.write(b"!")
    assert compare(longer, raw).offset == longer.stat().st_size - 1
    assert compare(raw, longer).offset == longer.stat().st_size - 1


def test_strict_looks_at_allocation(raw: Path, tmp_path: Path) -> None:
    full = tmp_path / "full.raw"
    full.write_bytes(raw.read_bytes())
    assert compare(raw, full).identical
    assert compare(raw, full, strict=True).reason == "allocation"
    assert compare(raw, raw, strict=True).identical


def test_cancel(raw: Path) -> None:
    with pytest.raises(Cancelled):
        compare(raw, raw, progress=lambda done, total, phase: False)


def test_command_says_what_qemu_says(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = write_sparse(tmp_path / "longer.raw", disk_bytes() + bytes(MIB))
    changed = tmp_path / "changed.raw"
    changed.write_bytes(disk_bytes()[:-700] + b"#" * 700)
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    for args in (
        [raw, image],
        ["-q", raw, image],
        ["-p", raw, image],
        [raw, longer],
        ["-s", raw, longer],
        [longer, changed],
        [raw, changed],
        ["-q", raw, changed],
        ["-f", "raw", "-F", "qcow2", raw, image],
        [raw, tmp_path / "missing"],
        ["-f", "qcow2", raw, image],
        [raw],
    ):
        theirs = qemu("qemu-img", "compare", *args, ok=(0, 1, 2))
        assert run("compare", *args) == theirs.returncode, args
        ours = capsys.readouterr()
        if "-p" not in args:
            assert ours.out == theirs.stdout
        assert bool(ours.err) == bool(theirs.stderr)
        assert ours.err.count("\n") == theirs.stderr.count("\n")
