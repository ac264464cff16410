"""rebase(): another backing file, the same disk; beside qemu-img rebase; cut short."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.qemu import qemu_check, qemu_img
from support.recorder import Recorder
from support.stamps import stamped
from test_commit import SHAPES, SIZE, Disks

import qcow2x
from qcow2x.ops.newbacking import HeaderFull, change_backing_file

MAPPED_64K = {"cluster_size": 65536}


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


def chain(disks: Disks, sizes: tuple[int, ...] = (SIZE, SIZE, SIZE), **options: Any) -> None:
    """Three layers; ``options`` are the topmost one's."""
    disks.add(sizes[0])
    disks.fill(21)
    disks.add(sizes[1], cluster_size=4096)
    disks.fill(22)
    disks.add(sizes[2], **options)
    disks.fill(23)


def other(folder: Path, size: int = SIZE, format: str = "qcow2") -> Path:
    """A disk like no other, in part like the bottom one."""
    path = folder / "other"
    data = stamped(0, size, 99)
    if format == "raw":
        path.write_bytes(data)
        return path
    qcow2x.create(path, size, cluster_size=2048)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(data[: size // 3], 0)
        image.write_zeroes(size // 2, 4096)
    return path


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("onto", ["other", "b0", None])
def test_the_disk_reads_the_same(
    disks: Disks, tmp_path: Path, shape: str, onto: str | None, compress: bool
) -> None:
    chain(disks, **SHAPES[shape])
    other(tmp_path)
    result = qcow2x.rebase(
        disks.path(),
        onto,
        backing_format="qcow2" if onto else None,
        compress=compress,
        references="follow",
    )
    assert disks.read(2) == disks.models[2]
    qemu_check(disks.path())
    with qcow2x.open(disks.path(), references="follow") as image:
        assert image.info().backing_filename == onto
        assert image.info().backing_format == (None if onto is None else "qcow2")
        compressed = any(run.compressed for run in image.extents(layers=1))
    if compress and result.data_bytes:
        assert compressed


@pytest.mark.parametrize("detect_zeroes", [True, False])
@pytest.mark.parametrize("onto", ["other", "b0", None])
@pytest.mark.parametrize(
    "sizes", [(SIZE, 4096, SIZE), (4096, SIZE, SIZE + 512), (SIZE, SIZE + 4096, 70_144)]
)
def test_sizes_that_differ(
    disks: Disks,
    tmp_path: Path,
    sizes: tuple[int, ...],
    onto: str | None,
    detect_zeroes: bool,
) -> None:
    chain(disks, sizes, cluster_size=1024)
    other(tmp_path, SIZE // 2 + 512)
    qcow2x.rebase(
        disks.path(),
        onto,
        backing_format="qcow2" if onto else None,
        detect_zeroes=detect_zeroes,
        references="follow",
    )
    assert disks.read(2) == disks.models[2]
    qemu_check(disks.path())


def test_what_is_the_same_below_is_not_copied(disks: Disks) -> None:
    chain(disks)
    twin = disks.folder / "twin"
    twin.write_bytes(disks.path(1).read_bytes())
    before = disks.path().read_bytes()
    result = qcow2x.rebase(disks.path(), "twin", backing_format="qcow2", references="follow")
    assert result == qcow2x.ops.rebase.RebaseResult(0, 0)
    # Only the name in the header is another.
    assert disks.path().read_bytes()[65536:] == before[65536:]
    assert disks.read(2) == disks.models[2]


def test_onto_a_raw_disk(disks: Disks, tmp_path: Path) -> None:
    chain(disks)
    other(tmp_path, format="raw")
    qcow2x.rebase(disks.path(), "other", backing_format="raw", references="follow")
    assert disks.read(2) == disks.models[2]
    qemu_check(disks.path())


def test_unsafe_changes_nothing_but_the_name(disks: Disks) -> None:
    chain(disks)
    disks.path(1).rename(disks.folder / "moved")
    before = disks.path().read_bytes()
    qcow2x.rebase(disks.path(), "moved", backing_format="qcow2", unsafe=True)
    assert disks.path().read_bytes()[65536:] == before[65536:]
    assert disks.read(2) == disks.models[2]
    qcow2x.rebase(disks.path(), None, unsafe=True)
    with qcow2x.open(disks.path()) as image:
        assert image.info().backing_filename is None


def test_refused(disks: Disks, tmp_path: Path) -> None:
    chain(disks)
    before = disks.path().read_bytes()
    for arguments, error in (
        ({"backing_file": "b0"}, ValueError),
        ({"backing_file": "b2", "backing_format": "qcow2"}, qcow2x.CorruptImage),
        ({"backing_file": "gone", "backing_format": "qcow2"}, FileNotFoundError),
        ({"backing_file": "n" * 1024, "backing_format": "raw", "unsafe": True}, ValueError),
        ({"backing_file": "b0", "backing_format": "qcow2", "references": "deny"}, PermissionError),
    ):
        with pytest.raises(error):
            qcow2x.rebase(disks.path(), **({"references": "follow"} | arguments))  # type: ignore[arg-type]
    upon = tmp_path / "upon"
    qcow2x.create(upon, SIZE, backing_file="b2", backing_format="qcow2")
    with pytest.raises((qcow2x.CorruptImage, qcow2x.ImageLocked)):
        qcow2x.rebase(disks.path(), "upon", backing_format="qcow2", references="follow")
    assert disks.path().read_bytes() == before
    small = tmp_path / "small"
    qcow2x.create(small, SIZE, cluster_size=512)
    with pytest.raises(HeaderFull):
        qcow2x.rebase(small, "n" * 500, backing_format="raw", unsafe=True)


def test_cancel_keeps_the_old_backing_file(disks: Disks, tmp_path: Path) -> None:
    chain(disks)
    other(tmp_path)
    with pytest.raises(qcow2x.Cancelled):
        qcow2x.rebase(
            disks.path(), None, references="follow", progress=lambda done, *_: done < SIZE
        )
    with qcow2x.open(disks.path(), references="follow") as image:
        assert image.info().backing_filename == "b1"
        assert image.pread(SIZE, 0) == disks.models[2]


@pytest.mark.parametrize("onto", ["other", "b0"])
def test_beside_qemu_img(disks: Disks, tmp_path: Path, onto: str) -> None:
    chain(disks, **MAPPED_64K)
    other(tmp_path)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in [*disks.names, "other"]:
        (theirs / name).write_bytes((tmp_path / name).read_bytes())
    qemu_img("rebase", "-b", onto, "-F", "qcow2", theirs / "b2")
    qcow2x.rebase(
        disks.path(), onto, backing_format="qcow2", detect_zeroes=False, references="follow"
    )
    assert qemu_img("compare", disks.path(), theirs / "b2")
    ours = qemu_img("map", "--output=json", disks.path())
    assert ours.count('"depth": 0') == qemu_img("map", "--output=json", theirs / "b2").count(
        '"depth": 0'
    )


# ---- The header ----------------------------------------------------------------------------------

NAMES = [None, "b", "a-longer-name-than-the-other-one", "n" * 300, "m" * 1000]


@pytest.mark.parametrize("old", range(len(NAMES)))
@pytest.mark.parametrize("shape", ["64k", "512", "version 2", "4k with bitmaps", "2k"])
def test_a_cut_of_power_leaves_the_old_or_the_new_name(shape: str, old: int) -> None:
    options: dict[str, Any] = {
        "512": {"cluster_size": 512},
        "version 2": {"compat": "0.10"},
        "4k with bitmaps": {"cluster_size": 4096},
        "2k": {"cluster_size": 2048},
    }.get(shape, {})
    room = options.get("cluster_size", 65536)
    rng = random.Random(f"{shape} {old}")
    for number, name in enumerate(NAMES):
        if number == old or sum(len(n or "") for n in (name, NAMES[old])) > room - 700:
            continue
        file = Recorder()
        qcow2x.create(file, 1 << 20, **options)
        formats = {n: ("raw" if n % 2 else "qcow2") if NAMES[n] else None for n in (old, number)}
        with qcow2x.open(file, "r+") as image:
            if "bitmaps" in shape:
                image.bitmaps.add("b", 65536)
            change_backing_file(image, NAMES[old], formats[old])
            file.start, file.log = bytes(file.data), []
            change_backing_file(image, name, formats[number])
        seen = set()
        for _, state in file.crashes(rng, 6):
            with qcow2x.open(Recorder(state), backing=False) as image:
                found = image.info()
                seen.add((found.backing_filename, found.backing_format))
                if "bitmaps" in shape:
                    assert "b" in image.bitmaps
        allowed = {(NAMES[old], formats[old]), (name, formats[number])}
        assert seen <= allowed
        with qcow2x.open(Recorder(file.data), backing=False) as image:
            info = image.info()
            assert (info.backing_filename, info.backing_format) == (name, formats[number])
        assert not qcow2x.check(Recorder(file.data)).corruptions


@pytest.mark.parametrize("shape", ["64k", "512", "subclusters"])
def test_the_disk_reads_the_same_after_a_cut_of_power(tmp_path: Path, shape: str) -> None:
    disks = Disks(tmp_path)
    disks.add(64 << 10)
    disks.fill(31)
    disks.add(96 << 10, **SHAPES[shape])
    disks.fill(32)
    other(tmp_path, 80 << 10)
    file = Recorder(disks.path().read_bytes())
    layers = {"b0": str(tmp_path / "b0"), "other": str(tmp_path / "other")}

    def find(reference: qcow2x.Reference) -> str:
        return layers[reference.name]

    from qcow2x.ops.rebase import rebase_layers

    with qcow2x.open(file, "r+", references=find) as image, qcow2x.open(layers["other"]) as new:
        rebase_layers(image, new, threads=1)
        change_backing_file(image, "other", "qcow2")
    want = bytes(disks.models[1])
    names = set()
    for _, state in file.crashes(random.Random(shape), 4):
        with qcow2x.open(Recorder(state), references=find, lock=False) as image:
            assert image.pread(image.size, 0) == want
            names.add(image.info().backing_filename)
        assert not qcow2x.check(Recorder(state)).corruptions
    assert names == {"b0", "other"}
