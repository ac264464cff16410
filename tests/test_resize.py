"""Resize, every way: preallocation, snapshots, backing files; the rest of resizing is in the state
machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.qemu import check_clean, qemu_img

import qcow2x

MIB = 1 << 20


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("extended_l2", [False, True])
def test_growth_with_every_preallocation(tmp_path: Path, mode: str, extended_l2: bool) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 3 * MIB + 512, extended_l2=extended_l2)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"x" * (3 * MIB + 512), 0)
        image.snapshots.create("s")
        image.resize(9 * MIB, preallocation=mode)
        assert image.pread(9 * MIB, 0) == (b"x" * (3 * MIB + 512)).ljust(9 * MIB, b"\0")
        grown = [e for e in image.extents(4 * MIB) if e.host_offset is not None]
        assert bool(grown) == (mode != "off")
        image.pwrite(b"y" * MIB, 5 * MIB)
        assert image.pread(MIB, 5 * MIB) == b"y" * MIB
    check_clean(path)
    blocks = path.stat().st_blocks * 512
    assert blocks >= 8 * MIB if mode in ("falloc", "full") else blocks < 6 * MIB
    qemu_img("snapshot", "-a", "s", path)
    check_clean(path)


def test_shrinking_leaves_a_snapshot_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 8 * MIB, cluster_size=4096)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"a" * (8 * MIB), 0)
        image.snapshots.create("s")
        image.resize(2 * MIB + 512, shrink=True)
        with image.snapshots.open("s") as then:
            assert then.pread(8 * MIB, 0) == b"a" * (8 * MIB)
        image.resize(8 * MIB)
        assert image.pread(8 * MIB, 0) == (b"a" * (2 * MIB + 512)).ljust(8 * MIB, b"\0")
    check_clean(path)
    with qcow2x.open(path, "r+") as image:
        image.snapshots.apply("s")
        assert image.pread(8 * MIB, 0) == b"a" * (8 * MIB)
        image.snapshots.delete("s")
    check_clean(path)


def test_version_2_with_snapshots_keeps_its_size(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MIB, compat="0.10")
    with qcow2x.open(path, "r+") as image:
        image.snapshots.create("s")
        with pytest.raises(qcow2x.UnsupportedFeature):
            image.resize(2 * MIB)
        image.snapshots.delete("s")
        image.resize(2 * MIB)
    check_clean(path)


def test_a_longer_backing_file_does_not_show_through(tmp_path: Path) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "disk.qcow2"
    base.write_bytes(b"b" * (6 * MIB))
    for compat in ("0.10", "1.1"):
        qcow2x.create(path, MIB + 512, backing_file=base, backing_format="raw", compat=compat)
        with qcow2x.open(path, "r+", references="follow") as image:
            image.resize(8 * MIB)
            assert image.pread(8 * MIB, 0) == (b"b" * (MIB + 512)).ljust(8 * MIB, b"\0")
        check_clean(path)


def test_what_would_lose_data_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 2 * MIB)
    with qcow2x.open(path, "r+") as image:
        with pytest.raises(ValueError, match="shrink=True"):
            image.resize(MIB)
        with pytest.raises(ValueError, match="512"):
            image.resize(MIB + 1)
        with pytest.raises(ValueError, match="Preallocation"):
            image.resize(MIB, shrink=True, preallocation="full")
        assert image.size == 2 * MIB


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("key", [None, b"secret"])
def test_growth_inside_the_last_cluster_is_preallocated(
    tmp_path: Path, mode: str, key: bytes | None
) -> None:
    path = tmp_path / "disk.qcow2"
    encryption = None if key is None else qcow2x.Encryption(key, iter_time_ms=10)
    old, new = 2_048_000, 2_064_384
    qcow2x.create(path, old, encryption=encryption)
    with qcow2x.open(path, "r+", key=key) as image:
        image.resize(new, preallocation=mode)
        image.pwrite(b"a" * old, 0)
        image.flush()
        before = path.stat()
        image.pwrite(b"b" * (new - old), old)
        image.flush()
        after = path.stat()
        assert after.st_size == before.st_size
        if key is None:
            assert after.st_blocks == before.st_blocks
        assert image.pread(new, 0) == b"a" * old + b"b" * (new - old)
        assert image.check().clean
    if key is None:
        check_clean(path)
