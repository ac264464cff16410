"""A checkpoint of several images: in all of them or in none, whatever happens in between."""

from __future__ import annotations

import errno
import random
import threading
from pathlib import Path

import pytest
from support.bitmaps import dirty_in_qemu, listed
from support.qemu import check_clean, qemu_io
from support.recorder import Recorder, apply

import qcow2x

KiB, MiB = 1 << 10, 1 << 20


class Joint(Recorder):
    """Several recorders with one clock."""

    def __init__(self, data: bytes, clock: list[Joint]) -> None:
        super().__init__(data)
        self.clock = clock

    def _do(self, *entry: object) -> None:
        super()._do(*entry)
        self.clock.append(self)

    def flush(self) -> None:
        super().flush()
        self.clock.append(self)

    def cut(self, happened: int, rng: random.Random) -> bytes:
        """The file as a cut of power may leave it after the first `happened` of its calls."""
        log = self.log[:happened]
        flushes = [i for i, entry in enumerate(log) if entry[0] == "flush"]
        durable = flushes[-1] if flushes else 0
        state = bytearray(self.start)
        keep = rng.choice([0.0, 0.5, 1.0])
        for i, entry in enumerate(log):
            if entry[0] != "flush" and (i < durable or rng.random() < keep):
                apply(state, entry)
        return bytes(state)


def disks(tmp_path: Path, n: int) -> list[Path]:
    paths = [tmp_path / f"disk{i}.qcow2" for i in range(n)]
    for i, path in enumerate(paths):
        qcow2x.create(path, (i + 1) * MiB, cluster_size=[512, 4096, 65536][i % 3])
    return paths


def dirty(image: qcow2x.Image, name: str) -> list[tuple[int, int]]:
    return [(e.offset, e.length) for e in image.bitmaps.extents(name) if e.dirty]


def test_every_image_gets_the_bitmap(tmp_path: Path) -> None:
    paths = disks(tmp_path, 3)
    with qcow2x.open(paths[0], "r+") as image:
        image.bitmaps.add("older")
        image.pwrite(b"x", 0)
        qcow2x.checkpoint([image, *paths[1:]], "monday", granularity=4096)
        image.pwrite(b"x", 512 * KiB)
        assert dirty(image, "monday") == [(512 * KiB, 4096)]
        assert image.bitmaps["older"].count == 2 * 64 * KiB
    for path in paths:
        check_clean(path)
        assert listed(path)["monday"]["granularity"] == 4096
    qemu_io(paths[1], "write 1M 512")
    assert dirty_in_qemu(paths[1], "monday") == [(MiB, 4096)]
    assert qcow2x.settle_checkpoints(paths) == {}
    with pytest.raises(ValueError, match="already"):
        qcow2x.checkpoint(paths[1:], "monday")


def test_one_that_refuses_leaves_none(tmp_path: Path) -> None:
    paths = disks(tmp_path, 3)
    old = tmp_path / "v2.qcow2"
    qcow2x.create(old, MiB, compat="0.10")
    with pytest.raises(qcow2x.UnsupportedFeature, match="version 2"):
        qcow2x.checkpoint([*paths, old], "monday")
    for path in paths:
        assert listed(path) == {}
        check_clean(path)
    for bad in ([], [paths[0], paths[0]]):
        with pytest.raises((ValueError, qcow2x.ImageLocked)):
            qcow2x.checkpoint(bad, "monday")
    with qcow2x.open(paths[0]) as image, pytest.raises(PermissionError):
        qcow2x.checkpoint([image], "monday")


def test_all_or_nothing_across_a_cut_of_power(tmp_path: Path) -> None:
    clock: list[Joint] = []
    recorders = [Joint(path.read_bytes(), clock) for path in disks(tmp_path, 3)]
    images = [qcow2x.open(recorder, "r+") for recorder in recorders]
    images[1].bitmaps.add("other")
    for image in images:
        image.pwrite(b"before" * 1000, 3000)
    qcow2x.checkpoint(images, "monday", granularity=512)
    for image in images:
        image.close()
    rng = random.Random(3)
    outcomes = set()
    calls = dict.fromkeys(recorders, 0)
    for n, recorder in enumerate([None, *clock]):
        if recorder is not None:
            calls[recorder] += 1
        for _ in range(2):
            states = [Recorder(each.cut(calls[each], rng)) for each in recorders]
            found = [qcow2x.open(state, "r+") for state in states]
            # What is written before it is settled counts, as far as the checkpoint came about.
            found[2].pwrite(b"after", 700 * KiB)
            if n % 2:
                found[2].close()
                found[2] = qcow2x.open(states[2], "r+")
            half = [any("checkpoint" in name for name in image.bitmaps) for image in found]
            if any(half):
                # Some of the images alone cannot tell.
                with pytest.raises(ValueError, match="give all"):
                    qcow2x.settle_checkpoints([found[half.index(True)]])
            settled = qcow2x.settle_checkpoints(found)
            have = ["monday" in image.bitmaps for image in found]
            assert len(set(have)) == 1, (n, have, half, settled)
            assert settled in ({}, {"monday": have[0]})
            assert bool(settled) == any(half)
            outcomes.add((bool(settled), have[0]))
            if have[0]:
                assert dirty(found[2], "monday") == [(700 * KiB, 512)]
                assert dirty(found[0], "monday") == []
            for image in found:
                assert not [name for name in image.bitmaps if "checkpoint" in name]
                assert not image.check().corruptions
                image.close()
    # Nothing yet, taken back, completed, all done.
    assert outcomes == {(False, False), (True, False), (True, True), (False, True)}


def test_a_call_that_fails_is_settled_by_the_next_checkpoint(tmp_path: Path) -> None:
    starts = [path.read_bytes() for path in disks(tmp_path, 2)]
    taken_back = completed = 0
    for failing in range(1, 60):
        recorders = [Recorder(start) for start in starts]
        images = [qcow2x.open(recorder, "r+") for recorder in recorders]
        recorders[1].failing = range(recorders[1].calls + failing, 1 << 20)
        recorders[1].error = errno.EIO
        try:
            qcow2x.checkpoint(images, "monday")
        except OSError:
            pass
        else:
            break
        finally:
            for image, recorder in zip(images, recorders, strict=True):
                try:
                    image.close()
                except OSError:
                    assert recorder is recorders[1]
                recorder.failing = None
        images = [qcow2x.open(recorder, "r+") for recorder in recorders]
        qcow2x.settle_checkpoints(images)
        have = ["monday" in image.bitmaps for image in images]
        assert len(set(have)) == 1
        if have[0]:
            completed += 1
            assert all(image.bitmaps["monday"].count == 0 for image in images)
        else:
            taken_back += 1
            qcow2x.checkpoint(images, "monday")
        for image in images:
            assert list(image.bitmaps) == ["monday"]
            assert not image.check().corruptions
            image.close()
    assert taken_back and completed


def test_writers_see_one_instant(tmp_path: Path) -> None:
    """A writer that writes to one disk and then to the other: no bitmap may hold the first of the
    two but not the second."""
    paths = disks(tmp_path, 2)
    stop = threading.Event()
    with qcow2x.open(paths[0], "r+") as first, qcow2x.open(paths[1], "r+") as second:
        count = [0]

        def work() -> None:
            while not stop.is_set() or count[0] < 50:
                at = count[0] % 2000 * 512
                first.pwrite(b"x", at)
                second.pwrite(b"x", at)
                count[0] += 1

        worker = threading.Thread(target=work)
        worker.start()
        for n in range(5):
            qcow2x.checkpoint([second, first], f"c{n}", granularity=512)
            # The same two writes: dirty in the first means dirty in the second.
        stop.set()
        worker.join()
        for n in range(5):
            one, two = (
                {
                    at // 512 + i
                    for at, length in dirty(image, f"c{n}")
                    for i in range(length // 512)
                }
                for image in (first, second)
            )
            assert one <= two
    for path in paths:
        check_clean(path)
