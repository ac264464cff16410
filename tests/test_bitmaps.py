"""Persistent dirty bitmaps: what was written is in them, whoever wrote it and whatever happened."""

from __future__ import annotations

import random
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.bitmaps import dirty_in_qemu, listed
from support.device import block_device
from support.qemu import check_clean, qemu_img, qemu_io
from support.recorder import Recorder

import qcow2x
from qcow2x._core.bitmapdir import decode_directory
from qcow2x._core.header import Header

KiB, MiB = 1 << 10, 1 << 20


def dirty(image: qcow2x.Image, name: str) -> list[tuple[int, int]]:
    return [(e.offset, e.length) for e in image.bitmaps.extents(name) if e.dirty]


def covers(runs: list[tuple[int, int]], offset: int, length: int) -> bool:
    return any(at <= offset and offset + length <= at + n for at, n in runs)


def granules(ranges: list[tuple[int, int]], granularity: int, size: int) -> list[tuple[int, int]]:
    """The runs of whole granules that the ranges touch."""
    touched = sorted(
        {g for at, n in ranges for g in range(at // granularity, (at + n - 1) // granularity + 1)}
    )
    runs: list[tuple[int, int]] = []
    for g in touched:
        start, end = g * granularity, min((g + 1) * granularity, size)
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], end - runs[-1][0])
        else:
            runs.append((start, end - start))
    return runs


def changed(before: bytes, after: bytes, granularity: int) -> list[int]:
    return [
        at
        for at in range(0, len(after), granularity)
        if before[at : at + granularity] != after[at : at + granularity]
    ]


SHAPES: list[tuple[dict[str, Any], int]] = [
    ({"cluster_size": 512}, 512),
    ({"cluster_size": 512}, 65536),
    ({"cluster_size": 4096, "refcount_bits": 1}, 4096),
    ({"cluster_size": 16384, "extended_l2": True}, 1024),
    ({"cluster_size": 65536}, 512),
    ({"cluster_size": 65536}, 65536),
    ({"cluster_size": 65536, "extended_l2": True, "compression_type": "zstd"}, 2 << 20),
    ({"cluster_size": 2 << 20}, 65536),
]


@pytest.mark.parametrize(("options", "granularity"), SHAPES, ids=str)
def test_what_changes_is_dirty_and_nothing_else(
    tmp_path: Path, options: dict[str, Any], granularity: int
) -> None:
    path = tmp_path / "disk.qcow2"
    size = 5 * MiB + 512
    rng = random.Random(str(options))
    qcow2x.create(path, size, **options)
    with qcow2x.open(path, "r+") as image:
        for _ in range(20):
            image.pwrite(rng.randbytes(8 * KiB), rng.randrange(size - 8 * KiB))
        image.bitmaps.add("since", granularity)
        before = image.pread(size, 0)
    touched: list[tuple[int, int]] = []
    image = qcow2x.open(path, "r+")
    cluster = image.cluster_size
    for step in range(60):
        offset = rng.randrange(size)
        length = min(size - offset, rng.choice([1, 512, 4096, 3 * cluster]))
        what = rng.choice(["write", "write", "zero", "unmap", "discard", "pack", "reopen", "store"])
        if what == "reopen":
            image.close()
            if step % 4 == 0:
                check_clean(path)
            image = qcow2x.open(path, "r+")
            continue
        if what == "store":
            image.bitmaps.store()
            continue
        if what == "write":
            image.pwrite(rng.randbytes(length), offset)
        elif what == "discard":
            image.discard(offset, length)
        elif what == "pack":
            offset -= offset % cluster
            length = min(cluster, size - offset)
            image.pwrite_compressed((rng.randbytes(16) * (length // 16 + 1))[:length], offset)
        else:
            image.write_zeroes(offset, length, unmap=what == "unmap")
        touched.append((offset, length))
    found = dirty(image, "since")
    image.close()
    check_clean(path)
    with qcow2x.open(path) as image:
        assert dirty(image, "since") == found
        after = image.pread(size, 0)
        assert image.bitmaps["since"].count == sum(n for _, n in found)
        assert image.check().clean
    for at in changed(before, after, granularity):
        assert covers(found, at, min(granularity, size - at)), at
    allowed = granules(touched, granularity, size)
    assert all(covers(allowed, at, n) for at, n in found)
    assert dirty_in_qemu(path, "since") == found


def test_qemu_and_qcow2x_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "32M")
    qemu_img("bitmap", "--add", "-g", "4096", path, "fine")
    qemu_img("bitmap", "--add", "--disable", path, "idle")
    qemu_io(path, "write 1M 64k")
    with qcow2x.open(path, "r+") as image:
        assert dirty(image, "fine") == [(MiB, 64 * KiB)]
        assert not image.bitmaps["idle"].enabled
        image.pwrite(b"x", 3 * MiB)
        image.bitmaps.add("ours", 32 * KiB)
        image.pwrite(b"x", 5 * MiB - 1)
    check_clean(path)
    assert {name: (e["granularity"], e["flags"]) for name, e in listed(path).items()} == {
        "fine": (4096, ["auto"]),
        "idle": (65536, []),
        "ours": (32768, ["auto"]),
    }
    qemu_io(path, "write 6M 1k", "discard 8M 1M")
    expected = [(MiB, 64 * KiB), (3 * MiB, 4096), (5 * MiB - 4096, 4096)]
    expected += [(6 * MiB, 4096), (8 * MiB, MiB)]
    with qcow2x.open(path) as image:
        assert dirty(image, "fine") == expected
        assert dirty(image, "ours")[0] == (5 * MiB - 32 * KiB, 32 * KiB)
        assert image.bitmaps["idle"].count == 0
    qemu_img("bitmap", "--clear", path, "ours")
    qemu_img("bitmap", "--disable", path, "fine")
    qemu_img("bitmap", "--enable", path, "idle")
    qemu_img("bitmap", "--merge", "fine", path, "ours")
    with qcow2x.open(path, "r+") as image:
        assert dirty(image, "fine") == expected
        assert (image.bitmaps["fine"].enabled, image.bitmaps["idle"].enabled) == (False, True)
        assert image.bitmaps["ours"].count == 32 * KiB * 5 + MiB
        image.bitmaps.disable("ours")
        image.bitmaps.enable("fine")
        image.pwrite(b"x", 20 * MiB)
        image.bitmaps.merge("idle", ["fine", "ours"])
        merged = dirty(image, "idle")
        image.bitmaps.remove("ours")
    assert covers(merged, 20 * MiB, 4096) and covers(merged, 8 * MiB, MiB)
    check_clean(path)
    assert set(listed(path)) == {"fine", "idle"}
    assert dirty_in_qemu(path, "idle") == merged
    qemu_img("bitmap", "--remove", path, "idle")
    with qcow2x.open(path, "r+") as image:
        assert list(image.bitmaps) == ["fine"]
        image.bitmaps.remove("fine")
    assert listed(path) == {}
    check_clean(path)


def test_bits_of_every_pattern(tmp_path: Path) -> None:
    """Runs across words and clusters of bits, all ones, the last partial granule; to_bytes."""
    path = tmp_path / "disk.qcow2"
    size = 512 * 8 * 512 * 3 + 512 * 77 + 100 // 512 * 512
    qcow2x.create(path, size, cluster_size=512)
    rng = random.Random(2)
    model = bytearray(size // 512)
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        image.bitmaps.add("bits", 512)
        for _ in range(400):
            first = rng.randrange(len(model))
            n = min(rng.choice([1, 1, 2, 63, 64, 65, 500]), len(model) - first)
            image.discard(first * 512, n * 512)
            model[first : first + n] = b"\1" * n
        # One cluster of bits wholly set.
        image.write_zeroes(4096 * 512, 4096 * 512)
        model[4096:8192] = b"\1" * 4096
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        # Nothing was stored there, yet it was written.
        got = bytearray(len(model))
        for extent in image.bitmaps.extents("bits"):
            if extent.dirty:
                first, n = extent.offset // 512, extent.length // 512
                got[first : first + n] = b"\1" * n
        assert got == model
        packed = image.bitmaps.to_bytes("bits")
        assert [packed[i // 8] >> (i % 8) & 1 for i in range(len(model))] == list(model)
        offset, length = 300 * 512, 5000 * 512
        part = list(image.bitmaps.extents("bits", offset, length))
        assert part[0].offset == offset and part[-1].offset + part[-1].length == offset + length
        assert sum(e.length for e in part if e.dirty) == sum(model[300:5300]) * 512
        # A coarser bitmap is dirty where any of the fine bits is.
        image.bitmaps.add("coarse", 8192)
        image.bitmaps.merge("coarse", ["bits"])
        runs = [(i * 512, 512) for i, bit in enumerate(model) if bit]
        assert dirty(image, "coarse") == granules(runs, 8192, size)
        image.bitmaps.clear("bits")
        assert image.bitmaps["bits"].count == 0
    check_clean(path)


def test_discarded_data_is_tracked_where_nothing_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.bitmaps.add("b")
        image.discard(0, 128 * KiB)
        assert dirty(image, "b") == [(0, 128 * KiB)]


# ---- Crashes ----


def abandoned(path: Path) -> Path:
    """A copy of an image as its writer left it when it died."""
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"x" * 512, 0)
        image.flush()
        copy = path.with_name("dead.qcow2")
        copy.write_bytes(path.read_bytes())
    return copy


def test_a_bitmap_whose_writer_died_can_only_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.bitmaps.add("tracked")
        image.bitmaps.add("idle", enabled=False)
    dead = abandoned(path)
    said = listed(dead)
    assert "in-use" in said["tracked"]["flags"]
    assert said["idle"]["flags"] == []
    with qcow2x.open(dead, "r+") as image:
        lost, idle = image.bitmaps["tracked"], image.bitmaps["idle"]
        assert (lost.inconsistent, lost.in_use, lost.count) == (True, True, None)
        assert (idle.inconsistent, idle.in_use, idle.count) == (False, False, 0)
        for use in (
            lambda: list(image.bitmaps.extents("tracked")),
            lambda: image.bitmaps.to_bytes("tracked"),
            lambda: image.bitmaps.clear("tracked"),
            lambda: image.bitmaps.enable("tracked"),
            lambda: image.bitmaps.merge("idle", ["tracked"]),
        ):
            with pytest.raises(qcow2x.CorruptImage, match="not stored by its last writer"):
                use()
        image.pwrite(b"y", 0)
    assert "in-use" in listed(dead)["tracked"]["flags"]
    check_clean(dead)
    with qcow2x.open(dead, "r+") as image:
        image.bitmaps.remove("tracked")
        assert list(image.bitmaps) == ["idle"]
    check_clean(dead)


def test_a_writer_that_ignores_bitmaps_leaves_no_stale_one(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.bitmaps.add("old")
    raw = bytearray(path.read_bytes())
    # What every writer does first that does not know what autoclear bit 0 stands for.
    struct.pack_into(">Q", raw, 88, 0)
    path.write_bytes(raw)
    with qcow2x.open(path, "r+") as image:
        assert dict(image.bitmaps) == {}
        image.pwrite(b"x", 0)
        image.bitmaps.add("new")
        image.pwrite(b"x", 512 * KiB)
    with qcow2x.open(path) as image:
        assert dirty(image, "new") == [(512 * KiB, 64 * KiB)]
        # The old bitmap's clusters have leaked, as with QEMU.
        assert image.check().corruptions == 0
    qemu_img("check", "-q", "-r", "leaks", path)
    check_clean(path)
    assert set(listed(path)) == {"new"}


def test_opening_to_write_and_writing_nothing_changes_no_byte(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.bitmaps.add("b")
        image.pwrite(b"x", 0)
    before = path.read_bytes()
    with qcow2x.open(path, "r+") as image:
        assert image.bitmaps["b"].count == 64 * KiB
        image.bitmaps.store()
        assert not image.bitmaps["b"].in_use
    assert path.read_bytes() == before


def test_a_cut_of_power_at_any_instant(tmp_path: Path) -> None:
    """A bitmap that is valid afterwards has a bit for all that changed since it was made."""
    path = tmp_path / "disk.qcow2"
    size = 512 * KiB
    qcow2x.create(path, size, cluster_size=512)
    rng = random.Random(11)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(rng.randbytes(size), 0)
        image.bitmaps.add("first", 4096)
    recorder = Recorder(path.read_bytes())
    image = qcow2x.open(recorder, "r+")
    # What the disk held, by the name of each bitmap, when it had no bit set.
    base = {"first": [image.pread(size, 0)]}
    for step in range(36):
        offset = rng.randrange(size - 8192)
        what = ("write", "write", "zero", "store", "add", "write", "clear", "reopen", "remove")[
            step % 9
        ]
        if what == "write":
            image.pwrite(rng.randbytes(rng.choice([100, 5000])), offset)
        elif what == "zero":
            image.write_zeroes(offset, 6000, unmap=True)
        elif what == "store":
            image.bitmaps.store()
        elif what == "add":
            image.bitmaps.add(f"made {step}", 1024)
            base[f"made {step}"] = [image.pread(size, 0)]
        elif what == "clear":
            base["first"].append(image.pread(size, 0))
            image.bitmaps.clear("first")
        elif what == "remove":
            image.bitmaps.remove(f"made {step - 4}")
        else:
            image.close()
            image = qcow2x.open(recorder, "r+")
    image.close()
    seen: set[tuple[str, bool]] = set()
    for n, (happened, state) in enumerate(recorder.crashes(random.Random(5), 2)):
        with qcow2x.open(Recorder(state)) as crashed:
            found = crashed.check()
            assert not found.corruptions and not found.check_errors, (happened, found.findings)
            now = crashed.pread(size, 0)
            for name, bitmap in crashed.bitmaps.items():
                seen.add((name.split()[0], bitmap.inconsistent))
                if bitmap.inconsistent:
                    continue
                runs = dirty(crashed, name)
                assert any(
                    all(covers(runs, at, 1024) for at in changed(held, now, 1024))
                    for held in base[name]
                ), (happened, name)
        with qcow2x.open(Recorder(state), "r+") as crashed:
            for name in list(crashed.bitmaps):
                crashed.bitmaps.remove(name)
            assert not crashed.check().corruptions
        if n % 60 == 0:
            path.write_bytes(state)
            said = qemu_img("check", "--output=json", path, code=None)
            assert '"corruptions"' not in said, said
    assert seen == {("first", False), ("first", True), ("made", False), ("made", True)}
    path.write_bytes(recorder.data)
    check_clean(path)


@pytest.mark.parametrize("error", ["full", "broken"])
def test_any_call_that_fails_leaves_no_wrong_bitmap(tmp_path: Path, error: str) -> None:
    import errno

    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 256 * KiB, cluster_size=512)
    with qcow2x.open(path, "r+") as image:
        image.bitmaps.add("b", 512)
        held = image.pread(image.size, 0)
    start = path.read_bytes()
    for failing in range(1, 200):
        recorder = Recorder(start)
        recorder.failing = range(failing, failing + 1)
        recorder.error = errno.ENOSPC if error == "full" else errno.EIO
        try:
            with qcow2x.open(recorder, "r+") as image:
                image.pwrite(b"a" * 5000, 70000)
                image.bitmaps.add("c", 1024)
                image.pwrite(b"b" * 600, 1000)
                image.bitmaps.remove("c")
        except OSError:
            pass
        else:
            if recorder.calls < failing:
                break
            # Tables need not move: where room is short for that they stay.
            assert error == "full"
        with qcow2x.open(Recorder(recorder.data)) as after:
            assert not after.check().corruptions
            now = after.pread(after.size, 0)
            for name, bitmap in after.bitmaps.items():
                if name == "b" and not bitmap.inconsistent:
                    runs = dirty(after, name)
                    assert all(covers(runs, at, 512) for at in changed(held, now, 512)), failing
    assert failing > 10


def test_room_that_lacked_at_a_store_is_found_later(tmp_path: Path) -> None:
    import errno

    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.bitmaps.add("b")
    recorder = Recorder(path.read_bytes())
    with qcow2x.open(recorder, "r+") as image:
        image.pwrite(b"x", 0)
        image.flush()
        recorder.failing, recorder.error = range(1, 1 << 20), errno.ENOSPC
        with pytest.raises(OSError):
            image.bitmaps.store()
        recorder.failing = None
        image.pwrite(b"x", 300 * KiB)
        image.bitmaps.store()
        assert dirty(image, "b") == [(0, 64 * KiB), (256 * KiB, 64 * KiB)]
    path.write_bytes(recorder.data)
    assert dirty_in_qemu(path, "b") == [(0, 64 * KiB), (256 * KiB, 64 * KiB)]


# ---- With other features ----


def test_resize_keeps_bits_and_adds_clear_ones(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    size = 3 * MiB + 512
    qcow2x.create(path, size, cluster_size=512)
    with qcow2x.open(path, "r+") as image:
        for name, granularity in (("fine", 512), ("coarse", 8192)):
            image.bitmaps.add(name, granularity)
        image.bitmaps.add("idle", enabled=False)
        # Wholly dirty: its entries are "all ones", which must not grow with the disk.
        image.write_zeroes(0, size)
        image.bitmaps.store()
        image.resize(9 * MiB)
        assert dirty(image, "fine") == [(0, size)]
        assert dirty(image, "coarse") == [(0, 3 * MiB + 8192)]
        assert image.bitmaps["idle"].count == 0
        image.pwrite(b"x", 9 * MiB - 1)
        with pytest.raises(qcow2x.UnsupportedFeature, match="cannot shrink"):
            image.resize(MiB, shrink=True)
        assert image.size == 9 * MiB
        with pytest.raises(ValueError, match="bits"):
            image.resize(1 << 50)
    check_clean(path)
    with qcow2x.open(path) as image:
        assert dirty(image, "fine") == [(0, size), (9 * MiB - 512, 512)]
    assert dirty_in_qemu(path, "fine") == [(0, size), (9 * MiB - 512, 512)]
    qemu_img("resize", "-q", path, "20M")
    with qcow2x.open(path, "r+") as image:
        assert dirty(image, "coarse") == [(0, 3 * MiB + 8192), (9 * MiB - 8192, 8192)]
        for name in list(image.bitmaps):
            image.bitmaps.remove(name)
        image.resize(MiB, shrink=True)
    check_clean(path)


def test_what_a_snapshot_brings_back_is_dirty(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 8 * MiB)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"1" * MiB, 0)
        image.snapshots.create("then")
        image.pwrite(b"2" * MiB, 4 * MiB)
        image.bitmaps.add("b")
        image.snapshots.apply("then")
        assert covers(dirty(image, "b"), 4 * MiB, MiB)
        with image.snapshots.open("then") as then:
            assert dict(then.bitmaps) == {}
        image.bitmaps.remove("b")
        image.resize(16 * MiB)
        image.bitmaps.add("c")
        with pytest.raises(qcow2x.UnsupportedFeature, match="another size"):
            image.snapshots.apply("then")
    check_clean(path)


def test_bitmaps_go_on_after_a_repair_of_the_open_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.bitmaps.add("b")
        image.pwrite(b"x", 0)
        image._reserve(128 * KiB)  # clusters that nothing uses: leaked
        assert image.check(repair="leaks").leaks_fixed == 2
        image.pwrite(b"x", 512 * KiB)
    check_clean(path)
    assert dirty_in_qemu(path, "b") == [(0, 64 * KiB), (512 * KiB, 64 * KiB)]


def test_amend_keeps_bitmaps_and_refuses_to_lose_them(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.bitmaps.add("b")
        image.pwrite(b"x", 0)
    with pytest.raises(qcow2x.UnsupportedFeature, match="persistent bitmaps"):
        qcow2x.amend(path, compat="0.10")
    qcow2x.amend(path, refcount_bits=64, lazy_refcounts=True)
    check_clean(path)
    assert dirty_in_qemu(path, "b") == [(0, 64 * KiB)]
    qcow2x.create(tmp_path / "v2.qcow2", MiB, compat="0.10")
    with (
        qcow2x.open(tmp_path / "v2.qcow2", "r+") as image,
        pytest.raises(qcow2x.UnsupportedFeature, match="version 2"),
    ):
        image.bitmaps.add("b")


def test_bitmaps_of_an_overlay_and_merging_from_another_image(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qcow2x.create(base, 4 * MiB)
    qcow2x.create(top, backing_file="base.qcow2", backing_format="qcow2")
    with qcow2x.open(top, "r+", references="follow") as image:
        image.bitmaps.add("t", 4096)
        image.pwrite(b"x", MiB)
    with qcow2x.open(base, "r+") as below, qcow2x.open(top, backing=False) as above:
        below.bitmaps.add("b")
        below.pwrite(b"x", 3 * MiB)
        below.bitmaps.merge("b", [(above, "t")])
        assert dirty(below, "b") == [(MiB, 64 * KiB), (3 * MiB, 64 * KiB)]
        below.resize(8 * MiB)
        with pytest.raises(ValueError, match="is for a disk of"):
            below.bitmaps.merge("b", [(above, "t")])
    check_clean(base)
    check_clean(top)


# The extension ends up at every place of the header: at a sector's border, behind long names.
HEADERS: list[tuple[int, int, int]] = [
    (cluster_size, name_length, extension)
    for cluster_size in (512, 1024, 4096, 65536)
    for name_length in (0, 30, 200, 500)
    for extension in (0, 1, 300, 347)
    # Those that fit into a cluster, with a feature name table in the larger ones.
    if 200 + (392 if cluster_size > 4096 else 0) + name_length + extension <= cluster_size
]


@pytest.mark.parametrize(("cluster_size", "name_length", "extension"), HEADERS)
def test_room_is_made_in_every_header(
    tmp_path: Path, cluster_size: int, name_length: int, extension: int
) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB, cluster_size=cluster_size)
    raw = bytearray(path.read_bytes())
    header = Header.parse(bytes(raw))
    if extension:
        header.set_extension(0x12345678, b"e" * extension)
    if name_length:
        header.backing_file = "/" * (name_length - 9) + "dev/zero0"
        header.backing_format = "raw"
    raw[:cluster_size] = header.encode()
    recorder = Recorder(raw)
    names = ["b", "c"]
    try:
        with qcow2x.open(recorder, "r+", backing=False if name_length else None) as image:
            for name in names:
                image.bitmaps.add(name)
            image.bitmaps.remove("b")
            image.bitmaps.remove("c")
            image.bitmaps.add("d")
    except qcow2x.UnsupportedFeature as exc:
        assert "no room" in str(exc) and cluster_size < 4096
        names = []
    for happened, state in recorder.crashes(random.Random(1), 2):
        seen = Header.parse(state, len(state))
        assert seen.backing_file == header.backing_file, happened
        assert seen.extension(0x12345678) == header.extension(0x12345678)
        with qcow2x.open(Recorder(state), backing=False if name_length else None) as image:
            assert not image.check().corruptions
            assert list(image.bitmaps) in (["b"], ["b", "c"], ["c"], [], ["d"])
    path.write_bytes(recorder.data)
    found = listed(path)
    assert set(found) == ({"d"} if names else set())
    after = Header.parse(path.read_bytes())
    assert after.backing_file == header.backing_file
    check_clean_without_backing(path)


def check_clean_without_backing(path: Path) -> None:
    with qcow2x.open(
        path, backing=None if Header.parse(path.read_bytes()).backing_file is None else False
    ) as image:
        assert image.check().clean


# ---- Threads ----


def test_writers_while_bitmaps_are_stored_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    size = 64 * MiB
    qcow2x.create(path, size)
    wrote: list[list[tuple[int, int]]] = [[], [], []]
    failed: list[BaseException] = []
    stop = threading.Event()
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        image.bitmaps.add("b", 4096)

        def work(mine: list[tuple[int, int]], seed: int) -> None:
            rng = random.Random(seed)
            try:
                while not stop.is_set() or len(mine) < 100:
                    offset = rng.randrange(size - 4096)
                    image.pwrite(b"w" * 1000, offset)
                    mine.append((offset, 1000))
            except BaseException as exc:
                failed.append(exc)

        workers = [threading.Thread(target=work, args=(w, i)) for i, w in enumerate(wrote)]
        for worker in workers:
            worker.start()
        for n in range(12):
            done = [r for w in wrote for r in list(w)]
            if n % 3 == 0:
                image.bitmaps.store()
            elif n % 3 == 1:
                image.bitmaps.add(f"more {n}", 65536)
            else:
                image.bitmaps.remove(f"more {n - 1}")
            runs = dirty(image, "b")
            assert all(covers(runs, at, length) for at, length in done[-50:])
        stop.set()
        for worker in workers:
            worker.join()
        assert not failed
    expected = granules([r for w in wrote for r in w], 4096, size)
    with qcow2x.open(path) as image:
        assert dirty(image, "b") == expected
    check_clean(path)


# ---- Bad input ----


def test_arguments_out_of_range(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        for name in ("", "n" * 1024, "a\0b"):
            with pytest.raises(ValueError, match="name"):
                image.bitmaps.add(name)
        for granularity in (0, 256, 3000, 1 << 32):
            with pytest.raises(ValueError, match="Granularity"):
                image.bitmaps.add("b", granularity)
        longest = "é" * 511 + "x"
        image.bitmaps.add(longest, 1 << 31)
        with pytest.raises(ValueError, match="already"):
            image.bitmaps.add(longest)
        for use in (image.bitmaps.remove, image.bitmaps.clear, image.bitmaps.extents):
            with pytest.raises(KeyError, match="no bitmap named 'other'"):
                use("other")
        assert "other" not in image.bitmaps and image.bitmaps.get("other") is None
        with pytest.raises(ValueError, match="outside"):
            image.bitmaps.extents(longest, MiB, 1)
        image.resize((2 << 40) + 512)
        with pytest.raises(ValueError, match="Use larger granularity"):
            image.bitmaps.add("too fine", 512)
    with qcow2x.open(path) as image, pytest.raises(PermissionError):
        image.bitmaps.add("b")
    check_clean(path)
    assert set(listed(path)) == {longest}


DAMAGE = {
    "directory past the end": ("ext", 16, ">Q", 1 << 40),
    "directory too short": ("ext", 8, ">Q", 16),
    "one bitmap more": ("ext", 0, ">I", 3),
    "one bitmap less": ("ext", 0, ">I", 1),
    "type": ("dir", 16, ">B", 2),
    "flags": ("dir", 12, ">I", 0x80000002),
    "granularity": ("dir", 17, ">B", 32),
    "name too long": ("dir", 18, ">H", 1024),
    "name past the end": ("dir", 18, ">H", 1000),
    "extra data past the end": ("dir", 20, ">I", 0xFFFFFFF0),
    "table misaligned": ("dir", 0, ">Q", 65536 + 512),
    "table too large": ("dir", 8, ">I", 0xFFFFFFFF),
    "table of another size": ("dir", 8, ">I", 2),
}


@pytest.mark.not_for_qemu("damaged directories")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.bitmaps.add("one")
        image.bitmaps.add("two")
    raw = bytearray(path.read_bytes())
    where, at, fmt, value = DAMAGE[damage]
    if where == "ext":
        place = raw.index(struct.pack(">II", 0x23852875, 24)) + 8
    else:
        place = Header.parse(bytes(raw)).bitmap_directory[0]  # type: ignore[index]
    struct.pack_into(fmt, raw, place + at, value)
    path.write_bytes(raw)
    with pytest.raises((qcow2x.CorruptImage, qcow2x.FormatError), match=r"bitmap"):
        qcow2x.open(path, "r+")
    with pytest.raises((qcow2x.CorruptImage, qcow2x.FormatError), match=r"bitmap"):
        with qcow2x.open(path) as image:
            dict(image.bitmaps)
    assert path.read_bytes() == raw


@pytest.mark.not_for_qemu("a damaged table")
def test_a_damaged_table_costs_that_bitmap_only(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 4 * MiB, cluster_size=512)
    with qcow2x.open(path, "r+") as image:
        image.bitmaps.add("bad", 512)
        image.bitmaps.add("good", 512)
        image.pwrite(b"x", 0)
    raw = bytearray(path.read_bytes())
    place = Header.parse(bytes(raw)).bitmap_directory[0]  # type: ignore[index]
    (table,) = struct.unpack_from(">Q", raw, place)
    struct.pack_into(">Q", raw, table, 0x0100000000000001)
    path.write_bytes(raw)
    with qcow2x.open(path) as image:
        with pytest.raises(qcow2x.CorruptImage, match="table is not valid"):
            dirty(image, "bad")
        assert dirty(image, "good") == [(0, 512)]
    image = qcow2x.open(path, "r+")
    image.pwrite(b"x", MiB)
    with pytest.raises(qcow2x.CorruptImage, match="table is not valid"):
        image.close()
    with qcow2x.open(path, "r+") as image:
        assert image.bitmaps["bad"].inconsistent
        assert dirty(image, "good") == [(0, 512), (MiB, 512)]
        image.bitmaps.remove("bad")
        assert image.check().corruptions == 0


@pytest.mark.not_for_qemu("QEMU refuses what it does not know")
def test_extra_data_is_kept_and_heeded(tmp_path: Path) -> None:
    """Unknown extra data: the bitmap is used only if its flag says that one may."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        for name in ("may", "not"):
            image.bitmaps.add(name)
    raw = bytearray(path.read_bytes())
    at, nbytes, _ = Header.parse(bytes(raw)).bitmap_directory  # type: ignore[misc]
    one, two = (bytes(raw[at + i * 32 : at + i * 32 + 32]) for i in range(2))
    extended = b""
    for entry, flags in ((one, 6), (two, 2)):
        extended += entry[:12] + struct.pack(">I", flags) + entry[16:20]
        extended += struct.pack(">I", 6) + b"extra!" + entry[24:27] + bytes(7)
    raw[at : at + len(extended)] = extended
    place = raw.index(struct.pack(">II", 0x23852875, 24)) + 8
    struct.pack_into(">Q", raw, place + 8, len(extended))
    path.write_bytes(raw)
    with qcow2x.open(path, "r+") as image:
        assert not image.bitmaps["may"].inconsistent and image.bitmaps["not"].inconsistent
        image.pwrite(b"x", 0)
    with qcow2x.open(path, "r+") as image:
        assert dirty(image, "may") == [(0, 64 * KiB)]
        # It missed a write: nobody may take it for valid any more.
        assert image.bitmaps["not"].in_use
        image.bitmaps.remove("not")
    raw = path.read_bytes()
    at, nbytes, _ = Header.parse(raw).bitmap_directory  # type: ignore[misc]
    assert b"extra!may" in raw[at : at + nbytes]


def test_tables_lie_next_to_the_directory(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    for path in (ours, theirs):
        qcow2x.create(path, 64 << 30, cluster_size=2 * MiB)
    for name, granularity in (("first", 512), ("second", 2 * MiB)):
        with qcow2x.open(ours, "r+") as image:
            image.bitmaps.add(name, granularity)
        qemu_img("bitmap", "--add", "-g", str(granularity), theirs, name)
    raw = ours.read_bytes()
    at, nbytes, count = Header.parse(raw[: 2 * MiB]).bitmap_directory  # type: ignore[misc]
    found = decode_directory(raw[at : at + nbytes], count, 2 * MiB, "", at)
    assert [table for _, _, _, table, _, _ in found] == [at + 2 * MiB, at + 4 * MiB]
    check_clean(ours)
    # As many clusters as QEMU takes; the last one ends where what is in it does.
    clusters = [-(-path.stat().st_size // (2 * MiB)) for path in (ours, theirs)]
    assert clusters[0] == clusters[1]


def test_a_full_device_lets_a_bitmap_be_removed(tmp_path: Path) -> None:
    with block_device(tmp_path / "device", 64 * 4096) as device:
        made = tmp_path / "disk.qcow2"
        qcow2x.create(made, MiB, cluster_size=4096)
        with device.open("r+b") as file:
            file.write(made.read_bytes())
        with qcow2x.open(device, "r+") as image:
            for name in ("a", "b", "c", "d"):
                image.bitmaps.add(name, 4096, enabled=False)
            with suppress(OSError):
                for at in range(0, MiB, 4096):
                    image.pwrite(b"x" * 4096, at)
            # One cluster for the new directory, none for the tables beside it.
            image.discard(0, 4096)
            image.flush()
            image.bitmaps.remove("b")
            assert list(image.bitmaps) == ["a", "c", "d"]
        check_clean(device)
