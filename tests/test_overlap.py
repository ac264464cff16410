"""Writes that a damaged entry leads to a table: refused, the image marked, the table unharmed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from support.qemu import qemu_img

import qcow2x

CLUSTER = 65536
COPIED = 1 << 63
TABLES = ["header", "l1", "reftable", "refblock", "l2", "snapshot table", "snapshot l1"]


def be64(data: bytes, at: int) -> int:
    return int(struct.unpack_from(">Q", data, at)[0])


def image_with_snapshot(path: Path) -> dict[str, int]:
    """Where its tables are."""
    qcow2x.create(path, 64 << 20)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"a" * CLUSTER, 0)
        image.snapshots.create("s")
        snapshot_l1 = image.snapshots[0].l1_offset
        image.pwrite(b"b" * (4 * CLUSTER), 0)
    data = path.read_bytes()
    mask = 0x00FFFFFFFFFFFE00
    l1, reftable = be64(data, 40), be64(data, 48)
    return {
        "header": 0,
        "l1": l1,
        "reftable": reftable,
        "refblock": be64(data, reftable) & mask,
        "l2": be64(data, l1) & mask,
        "snapshot table": be64(data, 64),
        "snapshot l1": snapshot_l1,
    }


def aim(path: Path, places: dict[str, int], guest_cl: int, host_off: int) -> None:
    with path.open("r+b") as file:
        file.seek(places["l2"] + 8 * guest_cl)
        file.write(struct.pack(">Q", COPIED | host_off))


@pytest.mark.not_for_qemu("damaged")
@pytest.mark.parametrize("table", TABLES)
def test_an_entry_that_points_at_a_table_does_not_overwrite_it(tmp_path: Path, table: str) -> None:
    path = tmp_path / "disk.qcow2"
    places = image_with_snapshot(path)
    # An L2 entry cannot say offset 0: nothing can aim at the header in this way.
    target = places[table] or places["l1"]
    aim(path, places, 2, target)
    before = path.read_bytes()[target : target + CLUSTER]
    with pytest.raises(qcow2x.ImageBroken), qcow2x.open(path, "r+") as image:
        with pytest.raises(qcow2x.CorruptImage, match="table") as caught:
            image.pwrite(b"x" * 4096, 2 * CLUSTER)
        assert caught.value.offset == target
        with pytest.raises(qcow2x.ImageBroken):
            image.pwrite(b"x", 5 * CLUSTER)
        assert image.pread(CLUSTER, 0) == b"b" * CLUSTER, "reads go on"
    assert path.read_bytes()[target : target + CLUSTER] == before
    with qcow2x.open(path) as image:
        assert image.info().corrupt
    with pytest.raises(qcow2x.CorruptImage):
        qcow2x.open(path, "r+")
    assert '"corrupt": true' in qemu_img("info", "--output=json", path)


@pytest.mark.not_for_qemu("damaged")
@pytest.mark.parametrize("table", TABLES)
def test_a_table_with_refcount_0_is_not_handed_out(tmp_path: Path, table: str) -> None:
    path = tmp_path / "disk.qcow2"
    places = image_with_snapshot(path)
    target = places[table]
    with path.open("r+b") as file:
        file.seek(places["refblock"] + 2 * (target // CLUSTER))
        file.write(b"\0\0")
    before = path.read_bytes()[target : target + CLUSTER]
    with pytest.raises(qcow2x.ImageBroken), qcow2x.open(path, "r+") as image:
        with pytest.raises(qcow2x.CorruptImage):
            image.pwrite(b"x" * CLUSTER, 20 * CLUSTER)
    after = path.read_bytes()[target : target + CLUSTER]
    if table == "header":
        # The corrupt bit is in there.
        before, after = before[:72] + before[80:], after[:72] + after[80:]
    assert after == before


@pytest.mark.not_for_qemu("damaged")
def test_two_tables_in_one_place_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    places = image_with_snapshot(path)
    with path.open("r+b") as file:
        file.seek(places["l1"])
        file.write(struct.pack(">Q", COPIED | places["refblock"]))
    before = path.read_bytes()[places["refblock"] :][:CLUSTER]
    with pytest.raises(qcow2x.ImageBroken), qcow2x.open(path, "r+") as image:
        with pytest.raises(qcow2x.CorruptImage):
            image.pwrite(b"x" * CLUSTER, 20 * CLUSTER)
    assert path.read_bytes()[places["refblock"] :][:CLUSTER] == before


@pytest.mark.not_for_qemu("damaged")
def test_what_is_not_guarded_is_written(tmp_path: Path) -> None:
    """`none` and `constant` mean what they say, for whoever must."""
    path = tmp_path / "disk.qcow2"
    places = image_with_snapshot(path)
    aim(path, places, 2, places["snapshot l1"])
    for level in ("constant", "none"):
        with qcow2x.open(path, "r+", overlap_check=level) as image:
            image.pwrite(b"x" * 512, 2 * CLUSTER)
    aim(path, places, 2, places["reftable"])
    with pytest.raises(qcow2x.ImageBroken):
        with qcow2x.open(path, "r+", overlap_check="constant") as image:
            with pytest.raises(qcow2x.CorruptImage):
                image.pwrite(b"x" * 512, 2 * CLUSTER)
    with pytest.raises(ValueError, match="overlap_check"):
        qcow2x.open(path, overlap_check="most")


@pytest.mark.not_for_qemu("damaged")
def test_all_guards_the_l2_tables_of_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    places = image_with_snapshot(path)
    shared = be64(path.read_bytes(), places["snapshot l1"]) & 0x00FFFFFFFFFFFE00
    assert shared != places["l2"]
    aim(path, places, 2, shared)
    with pytest.raises(qcow2x.ImageBroken), qcow2x.open(path, "r+", overlap_check="all") as image:
        with pytest.raises(qcow2x.CorruptImage):
            image.pwrite(b"x" * 512, 2 * CLUSTER)


@pytest.mark.not_for_qemu("damaged")
def test_version_2_is_poisoned_though_it_cannot_be_marked(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20, compat="0.10")
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"a" * CLUSTER, 0)
    data = path.read_bytes()
    l2 = be64(data, be64(data, 40)) & 0x00FFFFFFFFFFFE00
    aim(path, {"l2": l2}, 1, l2)
    with pytest.raises(qcow2x.ImageBroken), qcow2x.open(path, "r+") as image:
        with pytest.raises(qcow2x.CorruptImage):
            image.pwrite(b"x", CLUSTER)
        with pytest.raises(qcow2x.ImageBroken):
            image.pwrite(b"x", 0)
