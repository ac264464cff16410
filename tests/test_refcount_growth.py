"""New refcount blocks and a longer refcount table, when the file outgrows those it has."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from support.qemu import check_clean

import qcow2x

MIB = 1 << 20


def refcount_blocks(path: Path) -> list[int]:
    """Host offsets, in the order of what they describe; 0 where there is none."""
    raw = path.read_bytes()
    at, clusters = struct.unpack_from(">QI", raw, 48)
    (bits,) = struct.unpack_from(">I", raw, 20)
    return list(struct.unpack_from(f">{(clusters << bits) // 8}Q", raw, at))


def test_a_block_lies_behind_the_write_that_needs_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    # A block describes 512 clusters, 2 MiB of the file.
    qcow2x.create(path, 8 * MIB, cluster_size=4096, refcount_bits=64)
    with qcow2x.open(path, "r+") as image:
        for at in range(0, 8 * MIB, 256 << 10):
            image.pwrite(bytes([at >> 18 | 1]) * (256 << 10), at)
        for at in range(0, 8 * MIB, 256 << 10):
            assert image.pread(256 << 10, at) == bytes([at >> 18 | 1]) * (256 << 10)
    blocks = [at for at in refcount_blocks(path) if at]
    assert len(blocks) == 5
    for i, at in enumerate(blocks[1:], 1):
        # Inside what it describes, but not in front of the data.
        assert 2 * MIB * i < at < 2 * MIB * (i + 1)
    check_clean(path)


def test_clusters_in_front_of_a_new_block_are_fresh(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 8 * MIB, cluster_size=4096, refcount_bits=64)
    with qcow2x.open(path, "r+") as image:
        # The file ends a little in front of the end of what its first block describes.
        image.pwrite(b"x" * (2 * MIB - (64 << 10)), 0)
        before = path.stat().st_blocks * 512
        for at in range(4 * MIB, 5 * MIB, 4096):
            image.pwrite(b"y", at + 2048)
        assert image.pread(4096, 5 * MIB - 4096) == bytes(2048) + b"y" + bytes(2047)
        image.resize(16 * MIB, preallocation="metadata")
    check_clean(path)
    # Preallocated metadata takes no room for data, wherever the blocks went.
    assert path.stat().st_blocks * 512 - before < 2 * MIB


@pytest.mark.parametrize("refcount_bits", [16, 64])
def test_a_table_longer_than_a_block_describes(tmp_path: Path, refcount_bits: int) -> None:
    path = tmp_path / "disk.qcow2"
    # The L1 table of 2 GiB takes 1024 clusters in a row; a block describes 64 or 256.
    qcow2x.create(path, MIB, cluster_size=512, refcount_bits=refcount_bits)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"a" * MIB, 0)
        image.resize(2 << 30)
        image.pwrite(b"z" * 4096, (2 << 30) - 4096)
        assert image.pread(MIB, 0) == b"a" * MIB
    check_clean(path)
    assert path.stat().st_size < 4 * MIB
