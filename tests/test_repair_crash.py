"""Repairs that are cut short, undone, refused; dirty images; images that stay open meanwhile."""

import os
import random
import struct

import pytest
from support.device import block_device
from test_repair import (
    CLUSTER,
    COPIED,
    PLAIN,
    SNAPSHOTS,
    Raw,
    guest_bytes,
    make_plain,
    make_snapshots,
    qemu_create,
    qemu_io,
    qemu_verdict,
    run,
)

import qcow2x
from qcow2x.errors import Cancelled, CorruptImage, FormatError, ImageLocked

pytestmark = pytest.mark.not_for_qemu("damaged images")

CLEAN = {"corruptions": 0, "leaks": 0, "check-errors": 0}


class Recorder:
    """A storage object that remembers what was done to it, and can stop at any point."""

    def __init__(self, data):
        self.data = bytearray(data)
        self.calls = []

    def size(self):
        return len(self.data)

    def pread(self, length, offset):
        return bytes(self.data[offset : offset + length])

    def pwrite(self, buffer, offset):
        data = bytes(buffer)
        self.calls.append(("write", offset, data))
        self._put(offset, data)
        return len(data)

    def _put(self, offset, data):
        if len(self.data) < offset + len(data):
            self.data.extend(bytes(offset + len(data) - len(self.data)))
        self.data[offset : offset + len(data)] = data

    def flush(self):
        self.calls.append(("flush",))

    def truncate(self, size):
        self.calls.append(("truncate", size))
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    def crashed(self, before, upto, rng):
        """The file as a crash after ``upto`` calls may leave it: what was not flushed may be there
        or not, whole or in part."""
        out = Recorder(before)
        flushed = max([i for i in range(upto) if self.calls[i][0] == "flush"], default=-1)
        for i, call in enumerate(self.calls[:upto]):
            if call[0] == "write":
                data = call[2]
                if i > flushed:
                    data = data[: rng.choice([0, len(data), len(data) // 1024 * 512])]
                out._put(call[1], data)
            elif call[0] == "truncate":
                out.truncate(call[1])
        return bytes(out.data)


def broken(path, harm, make=make_plain):
    make(path)
    raw = Raw(path)
    harm(raw)
    raw.save()
    return bytes(raw.bytes)


CRASHES = {
    **{
        name: (make_plain, PLAIN[name])
        for name in (
            "data twice",
            "data entry lost",
            "data behind the file",
            "data is the L2 table",
            "refcounts all 0",
            "refcounts all noise",
            "no refcount block",
            "block is an L2 table",
            "block behind the file",
            "refcount table behind the file",
            "dirty bit and refcounts that lag",
            "corrupt bit and data twice",
            "refcounts, flags and entries",
            "everything about refcounts",
            "L1 to the refcount block",
            "L1 to the refcount table",
            "data is the refcount block",
            "data is the L1 table, which changes",
        )
    },
    **{
        name: (make_snapshots, SNAPSHOTS[name])
        for name in ("snapshots without extra data", "snapshot forgotten", "snapshots forgotten")
    },
}


@pytest.mark.parametrize("name", CRASHES)
def test_a_repair_cut_short_can_be_repeated_and_undone(tmp_path, name):
    make, harm = CRASHES[name]
    path, journal = tmp_path / "disk.qcow2", tmp_path / "undo"
    before = broken(path, harm, make)
    recorder = Recorder(before)
    assert qcow2x.check(recorder, repair="all", journal=journal).clean
    saved = journal.read_bytes()
    assert saved.endswith(b"DONE")
    unfinished = saved[:-4]
    rng = random.Random(name)
    kept = None
    for upto in range(len(recorder.calls) + 1):
        state = recorder.crashed(before, upto, rng)
        again = Recorder(state)
        assert qcow2x.check(again, repair="all").clean
        path.write_bytes(again.data)
        assert qemu_verdict(path) == CLEAN
        seen = guest_bytes(path)
        kept = kept or seen
        assert seen == kept
        journal.write_bytes(unfinished)
        undone = Recorder(state)
        assert qcow2x.undo_repair(undone, journal)
        assert bytes(undone.data) == before


def test_steps_are_durable_one_before_the_next(tmp_path):
    before = broken(tmp_path / "disk.qcow2", PLAIN["block is an L2 table"])
    recorder = Recorder(before)
    qcow2x.check(recorder, repair="all")
    # The refcount table, or the header where it moves to another place.
    header = [
        i for i, call in enumerate(recorder.calls) if call[0] == "write" and call[1] in (0, 4096)
    ]
    first_new = next(
        i for i, call in enumerate(recorder.calls) if call[0] == "write" and call[1] >= len(before)
    )
    assert recorder.calls[0][0] == "truncate"
    # The new block, a flush, then what points to it.
    assert first_new < header[0]
    assert ("flush",) in recorder.calls[first_new : header[0]]
    assert recorder.calls[-1] == ("flush",)


# ---- undo ---------------------------------------------------------------------------------------


@pytest.fixture
def repaired(tmp_path):
    path, journal = tmp_path / "disk.qcow2", tmp_path / "undo"
    before = broken(path, PLAIN["refcounts, flags and entries"])
    assert qcow2x.check(path, repair="all", journal=journal).clean
    return path, journal, before


def test_undo_is_refused_once_the_image_was_written_to(repaired):
    path, journal, before = repaired
    qemu_io(path, "write -P 3 12M 64k")
    after = path.read_bytes()
    with pytest.raises(CorruptImage, match="written to since"):
        qcow2x.undo_repair(path, journal)
    assert path.read_bytes() == after
    assert qcow2x.undo_repair(path, journal, force=True)
    assert path.read_bytes()[: len(before)][:4096] == before[:4096]


def test_undo_of_another_image_is_refused(repaired, tmp_path):
    _, journal, _ = repaired
    other = tmp_path / "other.qcow2"
    qemu_create(other, "21M", cluster_size=CLUSTER)
    with pytest.raises(CorruptImage, match="not the image"):
        qcow2x.undo_repair(other, journal, force=True)


def test_undo_twice_and_undo_cut_short(repaired):
    path, journal, before = repaired
    after = path.read_bytes()
    assert qcow2x.undo_repair(path, journal)
    assert path.read_bytes() == before
    assert qcow2x.undo_repair(path, journal)
    assert path.read_bytes() == before
    # Some of the old bytes back, some not.
    path.write_bytes(before[:9000] + after[9000:])
    assert qcow2x.undo_repair(path, journal)
    assert path.read_bytes() == before


def test_journal_that_was_never_finished_has_nothing_to_undo(repaired):
    path, journal, _ = repaired
    after, saved = path.read_bytes(), journal.read_bytes()
    for keep in (0, 10, 100, 200, len(saved) - 20, len(saved) - 5):
        journal.write_bytes(saved[:keep])
        assert not qcow2x.undo_repair(path, journal)
    journal.write_bytes(saved[:300] + b"x" + saved[301:])
    with pytest.raises(FormatError, match="damaged"):
        qcow2x.undo_repair(path, journal)
    journal.write_bytes(b"something else altogether" * 20)
    with pytest.raises(FormatError, match="no undo journal"):
        qcow2x.undo_repair(path, journal)
    assert path.read_bytes() == after


def test_journal_is_never_overwritten_and_written_only_if_needed(tmp_path):
    path, journal = tmp_path / "disk.qcow2", tmp_path / "undo"
    before = broken(path, PLAIN["refcount 0"])
    journal.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        qcow2x.check(path, repair="all", journal=journal)
    assert path.read_bytes() == before and journal.read_bytes() == b"mine"
    assert qcow2x.check(path, repair="all").clean
    assert qcow2x.check(path, repair="all", journal=tmp_path / "other").clean
    assert not (tmp_path / "other").exists()


def test_journal_without_room_leaves_the_image_alone(tmp_path):
    path = tmp_path / "disk.qcow2"
    before = broken(path, PLAIN["refcounts all 0"])
    with pytest.raises(OSError):
        qcow2x.check(path, repair="all", journal=tmp_path / "no" / "such" / "folder")
    assert path.read_bytes() == before


# ---- who may repair, and when -------------------------------------------------------------------


def test_cancelled_repair_changes_nothing(tmp_path):
    path = tmp_path / "disk.qcow2"
    before = broken(path, PLAIN["refcounts all 0"])
    for phase in ("check", "repair", "verify"):
        with pytest.raises(Cancelled):
            qcow2x.check(path, repair="all", progress=lambda *step, at=phase: step[2] != at)
        assert path.read_bytes() == before


def test_image_in_use_is_not_repaired(tmp_path):
    path = tmp_path / "disk.qcow2"
    broken(path, PLAIN["data entry lost"])
    with qcow2x.open(path, "r"), pytest.raises(ImageLocked):
        qcow2x.check(path, repair="all")
    with qcow2x.open(path, "r+"), pytest.raises(ImageLocked):
        qcow2x.check(path)


def test_open_image_repairs_itself_and_goes_on(tmp_path):
    path, journal = tmp_path / "disk.qcow2", tmp_path / "undo"
    for name in ("block is an L2 table", "refcounts all 0", "data twice", "L1 to a data cluster"):
        broken(path, PLAIN[name])
        with qcow2x.open(path, "r+") as image:
            assert image.check(repair="all", journal=journal).clean
            for offset in range(0, 16 << 20, 1 << 20):
                image.pwrite(b"n" * 5000, offset)
            assert image.check().clean
        assert qemu_verdict(path) == CLEAN
        journal.unlink()


# ---- dirty images -------------------------------------------------------------------------------


def incompatible(path):
    with open(path, "rb") as file:
        file.seek(72)
        return struct.unpack(">Q", file.read(8))[0]


def test_dirty_image_is_rebuilt_when_opened_for_writing(tmp_path):
    path = tmp_path / "disk.qcow2"
    before = broken(path, PLAIN["dirty bit and refcounts that lag"])
    with qcow2x.open(path) as image:
        assert image.info().dirty
        data = image.pread(image.size, 0)
    assert path.read_bytes() == before
    with qcow2x.open(path, "r+") as image:
        assert incompatible(path) == 0
        assert image.check().clean
        assert image.pread(image.size, 0) == data
        image.pwrite(b"new" * 1000, 5 << 20)
    assert qemu_verdict(path) == CLEAN


def test_lazy_refcounts_of_a_killed_writer_are_rebuilt(tmp_path):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, "64M", cluster_size=CLUSTER, lazy_refcounts="on")
    run(
        *("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 3M", "-c", "write -P 6 40M 1M"),
        *("-c", "flush", "-c", "sigraise 9", path),
        ok=(-9, 137),
    )
    assert incompatible(path) & 1
    with qcow2x.open(path, "r+") as image:
        assert image.pread(3 << 20, 0) == b"\x05" * (3 << 20)
        image.pwrite(b"\x07" * (1 << 20), 20 << 20)
    assert qemu_verdict(path) == CLEAN
    qemu_io(path, "read -P 5 0 3M", "read -P 6 40M 1M", "read -P 7 20M 1M")


def test_dirty_image_with_other_damage_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "disk.qcow2"
    before = broken(
        path, lambda raw: (raw.put(72, 1), raw.put(raw.l2() + 8, COPIED | (1 << 40) + 512))
    )
    with pytest.raises(CorruptImage, match="repair"):
        qcow2x.open(path, "r+")
    assert path.read_bytes() == before
    assert qcow2x.check(path, repair="all").clean
    with qcow2x.open(path, "r+") as image:
        assert image.check().clean


def test_rebuild_cut_short_is_done_by_the_next_open(tmp_path):
    path = tmp_path / "disk.qcow2"
    before = broken(
        path,
        lambda raw: (raw.put(72, 1), raw.put(raw.rt, 0), raw.put(raw.l2(), raw.data())),
    )
    recorder = Recorder(before)
    qcow2x.open(recorder, "r+").close()
    rng = random.Random(1)
    for upto in range(len(recorder.calls) + 1):
        again = Recorder(recorder.crashed(before, upto, rng))
        with qcow2x.open(again, "r+") as image:
            assert image.check().clean
        path.write_bytes(again.data)
        assert qemu_verdict(path) == CLEAN


def test_corrupt_image_opens_for_writing_after_its_repair(tmp_path):
    path = tmp_path / "disk.qcow2"
    broken(path, PLAIN["corrupt bit and data twice"])
    with pytest.raises(CorruptImage, match="marked corrupt"):
        qcow2x.open(path, "r+")
    assert qcow2x.check(path, repair="all").clean
    with qcow2x.open(path, "r+") as image:
        assert not image.info().corrupt


# ---- bounds -------------------------------------------------------------------------------------


def test_repair_of_a_large_image_spills_and_ends(tmp_path):
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 4 << 30, cluster_size=4096, preallocation="metadata")
    with open(path, "r+b") as file:
        file.seek(48)
        (table,) = struct.unpack(">Q", file.read(8))
        size = os.path.getsize(path)
        file.seek(table)
        file.write(bytes(4096))
    result = qcow2x.check(path, repair="all")
    assert result.clean and result.allocated_clusters == 1 << 20
    assert qemu_verdict(path) == CLEAN
    assert os.path.getsize(path) < size + (40 << 20)


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("name", ["data twice", "everything about refcounts", "no refcount block"])
def test_a_block_device_is_repaired_and_put_back(tmp_path, name, sector):
    """A device is longer than the image on it and cannot grow."""
    start = broken(tmp_path / "disk.qcow2", PLAIN[name])
    size = len(start) + (1 << 20) & -4096
    with block_device(tmp_path / "device", size, sector) as device:
        device.write_bytes(start)
        before = device.read_bytes()[:size]
        journal = tmp_path / "undo"
        assert qcow2x.check(device, repair="all", journal=journal).clean
        assert qemu_verdict(device)["corruptions"] == 0
        assert qcow2x.check(device).corruptions == 0
        assert qcow2x.undo_repair(device, journal)
        assert device.read_bytes()[:size] == before
