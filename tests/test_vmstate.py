"""The state of a machine that is kept behind the disk: what qemu-io reads and writes with -b."""

import random
from pathlib import Path
from typing import Any

import pytest
from support.qemu import check_clean, qemu_io

import qcow2x
from qcow2x.errors import UnsupportedFeature

SHAPES: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 65536},
    {"cluster_size": 65536, "extended_l2": True},
    {"cluster_size": 1024, "compat": "0.10"},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def test_reads_what_was_written_and_zeros_elsewhere(tmp_path: Path, shape: dict[str, Any]) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20, **shape)
    rng = random.Random(1)
    model = bytearray(300_000)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"disk" * 1000, 0)
        assert image.vmstate_pread(1000, 0) == bytes(1000)
        for _ in range(40):
            at = rng.randrange(len(model))
            data = rng.randbytes(rng.choice([1, 100, 512, 3000, 70_000]))[: len(model) - at]
            assert image.vmstate_pwrite(data, at) == len(data)
            model[at : at + len(data)] = data
        assert image.vmstate_pread(len(model) + 512, 0) == bytes(model) + bytes(512)
        assert image.pread(4000, 0) == b"disk" * 1000
        assert not any(image.pread(image.size, 4000))
    check_clean(path)
    with qcow2x.open(path) as image:
        assert image.vmstate_pread(len(model), 0) == model


def test_qemu_io_reads_it_and_ours_reads_qemu_io_s(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 64 << 20)
    with qcow2x.open(path, "r+") as image:
        assert image.vmstate_offset == 512 << 20
        image.vmstate_pwrite(b"\x11" * 70_144, 1 << 40)
    qemu_io(path, "read -b -P 0x11 1T 70144", "read -b -P 0 0 64k", "write -b -P 0x22 3G 4k")
    with qcow2x.open(path) as image:
        assert image.vmstate_pread(4096, 3 << 30) == b"\x22" * 4096
        assert image.vmstate_pread(512, 1 << 40) == b"\x11" * 512


def test_a_backing_file_does_not_show_through(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * (2 << 20))
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 64 << 10, cluster_size=512, backing_file=base, backing_format="raw")
    with qcow2x.open(path, "r+", references="follow") as image:
        assert image.vmstate_offset < 2 << 20
        image.vmstate_pwrite(b"x", 1000)
        assert image.vmstate_pread(2000, 0) == bytes(1000) + b"x" + bytes(999)
        assert image.pread(64 << 10, 0) == b"b" * (64 << 10)
    check_clean(path)


def test_a_snapshot_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20)
    with qcow2x.open(path, "r+") as image:
        image.vmstate_pwrite(b"one" * 50_000, 0)
        image.snapshots.create("s")
        image.vmstate_pwrite(b"two", 90_000)
        assert image.vmstate_pread(9, 89_997) == b"onetwoone"
        image.snapshots.apply("s")
        assert image.vmstate_pread(150_000, 0) == b"one" * 50_000
        image.snapshots.delete("s")
        assert image.check().clean
    check_clean(path)


def test_it_never_becomes_part_of_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20, cluster_size=4096)
    with qcow2x.open(path, "r+") as image:
        image.vmstate_pwrite(b"secret" * 1000, 0)
        # The same L1 entries serve the disk: the state stays.
        image.resize(2 << 20)
        assert image.vmstate_pread(6, 0) == b"secret"
        image.resize(9 << 20)
        assert not any(image.pread(image.size, 0))
        assert not any(image.vmstate_pread(6000, 0))
    check_clean(path)


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20, cluster_size=512)
    with qcow2x.open(path, "r+") as image:
        with pytest.raises(OSError, match="large"):
            image.vmstate_pwrite(b"x", 1 << 45)
        with pytest.raises(ValueError):
            image.vmstate_pwrite(b"x", -1)
        with pytest.raises(ValueError):
            image.vmstate_pread(10, -1)
        assert image.vmstate_pwrite(b"", 5) == 0
    with qcow2x.open(path) as image, pytest.raises(PermissionError):
        image.vmstate_pwrite(b"x", 0)
    raw = tmp_path / "data.raw"
    qcow2x.create(path, 1 << 20, data_file=raw)
    with qcow2x.open(path, "r+", references="follow") as image:
        with pytest.raises(UnsupportedFeature):
            image.vmstate_pwrite(b"x", 0)
        with pytest.raises(UnsupportedFeature):
            image.vmstate_pread(1, 0)
