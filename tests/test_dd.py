"""dd(): a part of a disk, counted in blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import MIB, disk_bytes, qemu_img, write_sparse

import qcow2x


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_sparse(tmp_path / "disk.raw", disk_bytes())


@pytest.mark.parametrize(
    ("block_size", "count", "skip"),
    [
        (512, None, 0),
        (5, None, 0),
        (1999, 700, 3),
        (65536, 20, 4),
        (MIB, 2, 1),
        (MIB, 100, 0),
        (512, 0, 0),
        (512, 10, 20),
        (512, None, 1 << 40),
    ],
)
def test_part_of_a_disk(
    raw: Path, tmp_path: Path, block_size: int, count: int | None, skip: int
) -> None:
    data = disk_bytes()
    end = len(data) if count is None else min(len(data), count * block_size)
    expected = data[min(end, skip * block_size) : end]
    image = tmp_path / "source.qcow2"
    qcow2x.convert(raw, image, compress=True, cluster_size=4096)
    for number, source in enumerate((raw, image)):
        out = tmp_path / f"{number}.raw"
        qcow2x.dd(source, out, block_size=block_size, count=count, skip=skip, dst_format="raw")
        assert out.read_bytes() == expected
        copy = tmp_path / f"{number}.qcow2"
        result = qcow2x.dd(source, copy, block_size=block_size, count=count, skip=skip)
        assert result.size == -(-len(expected) // 512) * 512
        qemu_img("check", copy)
        with qcow2x.open(copy) as disk:
            assert disk.pread(disk.size, 0) == expected.ljust(disk.size, b"\0")


def test_zeros_are_not_stored(tmp_path: Path) -> None:
    source = tmp_path / "zeros.raw"
    source.write_bytes(bytes(8 * MIB))
    result = qcow2x.dd(source, tmp_path / "out.qcow2", block_size=4096)
    assert (result.data_bytes, result.zero_bytes) == (0, 8 * MIB)


def test_options_of_convert(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.qcow2"
    qcow2x.dd(raw, out, block_size=MIB, count=2, cluster_size=4096, compress=True)
    with qcow2x.open(out) as image:
        assert image.cluster_size == 4096
        assert any(extent.compressed for extent in image.extents())


@pytest.mark.parametrize(
    "options",
    [{"block_size": 0}, {"block_size": 1 << 31}, {"count": -1}, {"skip": -1}],
    ids=str,
)
def test_numbers_out_of_range(raw: Path, tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        qcow2x.dd(raw, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_target_that_is_the_source_is_refused(raw: Path) -> None:
    with pytest.raises(ValueError, match="read from"):
        qcow2x.dd(raw, raw, count=1, dst_format="raw")
