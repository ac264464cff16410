"""Writing zeros to parts of clusters: what becomes a mark and what has to become data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.qemu import check_clean, qemu_img
from support.recorder import Recorder

import qcow2x

KiB, MiB = 1 << 10, 1 << 20
CLUSTER = 64 * KiB


@pytest.fixture
def image(tmp_path: Path) -> Iterator[qcow2x.Image]:
    path = tmp_path / "image.qcow2"
    qcow2x.create(path, MiB + 4 * KiB)
    with qcow2x.open(path, "r+") as image:
        yield image
    check_clean(path)


def kinds(image: qcow2x.Image, offset: int = 0, length: int | None = None) -> list[str]:
    """What each run is: its first KiB, its length in KiB, and its sort."""
    return [
        f"{run.offset // KiB}+{run.length // KiB} "
        + ("data" if run.data else "zero" if run.allocated else "none")
        + (f" below {run.depth}" if run.depth else "")
        for run in image.extents(offset, length)
    ]


@pytest.mark.parametrize("unmap", [False, True])
def test_all_of_an_empty_cluster_is_marked(image: qcow2x.Image, unmap: bool) -> None:
    image.write_zeroes(1, 1, unmap=unmap)
    image.write_zeroes(3 * CLUSTER - 512, 1024, unmap=unmap)
    image.write_zeroes(MiB + 512, 512, unmap=unmap)
    assert kinds(image) == [
        "0+64 zero", "64+64 none", "128+128 zero", "256+768 none", "1024+4 zero"
    ]  # fmt: skip


def test_zeros_beside_data_are_data(image: qcow2x.Image) -> None:
    image.pwrite(b"x", 100)
    image.write_zeroes(50, 100)
    assert kinds(image, 0, CLUSTER) == ["0+64 data"]
    assert image.pread(CLUSTER, 0) == bytes(CLUSTER)


def test_a_kept_cluster_stays_kept(image: qcow2x.Image) -> None:
    image.pwrite(b"x" * CLUSTER, 0)
    image.write_zeroes(0, CLUSTER)
    (before,) = image.extents(0, CLUSTER)
    assert before.zero
    assert before.host_offset
    image.write_zeroes(10, 20)
    image.write_zeroes(10, 20, unmap=True)
    assert list(image.extents(0, CLUSTER)) == [before]


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_over_a_backing_file(tmp_path: Path, compat: str) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    with base.open("wb") as file:
        file.seek(4 * CLUSTER)
        file.write(b"x" * 4 * KiB)
        file.truncate(MiB)
    qcow2x.create(top, MiB + CLUSTER, backing_file=str(base), backing_format="raw", compat=compat)
    with qcow2x.open(top, "r+", references="follow") as image:
        image.write_zeroes(CLUSTER + 1, 1)
        image.write_zeroes(4 * CLUSTER + 4 * KiB, 512)
        image.write_zeroes(4 * CLUSTER + 6 * CLUSTER, 2 * CLUSTER)
        image.write_zeroes(MiB + 1, 1)
        sort = "zero" if compat == "1.1" else "data"
        # What was written is in this layer, whatever the one below reads as.
        assert kinds(image) == [
            "0+64 zero below 1",
            f"64+64 {sort}",
            "128+128 zero below 1",
            "256+64 data",
            "320+320 zero below 1",
            f"640+128 {sort}",
            "768+256 zero below 1",
            f"1024+64 {sort}",
        ]
        assert image.pread(4 * KiB + 512, 4 * CLUSTER) == b"x" * 4 * KiB + bytes(512)
        disk = image.pread(image.size, 0)
    assert disk == base.read_bytes() + bytes(CLUSTER)
    check_clean(top)


@pytest.fixture
def fine(tmp_path: Path) -> Iterator[qcow2x.Image]:
    """Subclusters of 2 KiB."""
    path = tmp_path / "fine.qcow2"
    qcow2x.create(path, 500 * KiB, extended_l2=True)
    with qcow2x.open(path, "r+") as image:
        yield image
    check_clean(path)


def test_subclusters_are_marked_one_by_one(fine: qcow2x.Image) -> None:
    fine.pwrite(b"x" * CLUSTER, 0)
    # The first is beside data; the second is not whole either, but nothing is beside it.
    fine.write_zeroes(3 * KiB, 5 * KiB)
    fine.write_zeroes(70 * KiB + 1, 1)
    assert kinds(fine, 0, 2 * CLUSTER) == [
        "0+4 data", "4+4 zero", "8+56 data", "64+6 none", "70+2 zero", "72+56 none"
    ]  # fmt: skip
    expected = b"x" * 3 * KiB + bytes(5 * KiB) + b"x" * 56 * KiB
    assert fine.pread(CLUSTER, 0) == expected


def test_the_end_of_the_disk_completes_a_subcluster(fine: qcow2x.Image) -> None:
    fine.write_zeroes(448 * KiB + 512, fine.size - 448 * KiB - 512)
    assert kinds(fine, 448 * KiB) == ["448+52 zero"]
    fine.resize(512 * KiB)
    assert fine.pread(CLUSTER, 448 * KiB) == bytes(CLUSTER)


def test_a_compressed_cluster_is_decoded_only_where_it_must_be(fine: qcow2x.Image) -> None:
    for cluster in range(3):
        fine.pwrite_compressed(b"text" * (CLUSTER // 4), cluster * CLUSTER)
    fine.write_zeroes(CLUSTER - 3 * KiB, CLUSTER + 6 * KiB)
    assert kinds(fine, 0, 3 * CLUSTER) == [
        "0+62 data", "62+2 zero", "64+64 zero", "128+64 data"
    ]  # fmt: skip
    expected = b"text" * (3 * CLUSTER // 4)
    low, high = CLUSTER - 3 * KiB, 2 * CLUSTER + 3 * KiB
    assert fine.pread(3 * CLUSTER, 0) == expected[:low] + bytes(high - low) + expected[high:]


def test_zeros_of_a_shared_cluster_need_no_copy(fine: qcow2x.Image) -> None:
    fine.pwrite(b"x" * CLUSTER, 0)
    fine.snapshots.create("before")
    (before,) = fine.extents(0, CLUSTER)
    fine.write_zeroes(26 * KiB, 2 * KiB)
    first, zero, _ = fine.extents(0, CLUSTER)
    assert (first.host_offset, zero.zero) == (before.host_offset, True)
    with fine.snapshots.open("before") as old:
        assert old.pread(CLUSTER, 0) == b"x" * CLUSTER


def test_discard_without_backing_leaves_what_keeps_nothing(fine: qcow2x.Image) -> None:
    fine.write_zeroes(0, 4 * KiB)
    fine.discard(0, CLUSTER)
    assert kinds(fine, 0, CLUSTER) == ["0+4 zero", "4+60 none"]


def test_kept_zeros_between_data_are_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qcow2x.create(path, 3 * CLUSTER)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"x" * 3 * CLUSTER, 0)
        before = list(image.extents())
        image.write_zeroes(CLUSTER, CLUSTER)
    file = Recorder(path.read_bytes())
    with qcow2x.open(file, "r+") as image:
        image.pwrite(b"y" * 3 * CLUSTER, 0)
        image.flush()
        data = [e for e in file.log if e[0] == "write" and b"yyyy" in bytes(e[2])]
        assert len(data) == 1
        assert [r._replace(filename="") for r in image.extents()] == [
            r._replace(filename="") for r in before
        ]
        assert image.pread(3 * CLUSTER, 0) == b"y" * 3 * CLUSTER
    path.write_bytes(bytes(file.data))
    check_clean(path)
    assert "3" in qemu_img("map", "--output=json", path)
