"""Lazy refcounts: they wait for the close, the dirty bit says so meanwhile, and whoever opens such an
image for writing gets them back."""

import random
from pathlib import Path
from typing import Any

import pytest
from support.qemu import check_clean, compare_bytes, qemu_check, qemu_img
from support.recorder import Recorder
from test_write_order import KiB, Session, fresh

import qcow2x
from qcow2x._core.header import Header

DIRTY = 72 + 7


def made(tmp_path: Path, **options: Any) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20, lazy_refcounts=True, **options)
    return path


def is_dirty(recorder: Recorder) -> bool:
    return bool(recorder.data[DIRTY] & 1)


def test_the_bit_comes_with_the_first_allocation_and_goes_with_the_close(tmp_path: Path) -> None:
    recorder = Recorder(made(tmp_path).read_bytes())
    image = qcow2x.open(recorder, "r+")
    image.pread(1024, 0)
    image.flush()
    assert not is_dirty(recorder)
    image.pwrite(b"x" * 512, 0)
    assert is_dirty(recorder)
    # Durable before anything that counts on it.
    assert ("flush",) in recorder.log
    image.close()
    assert not is_dirty(recorder)
    path = tmp_path / "end.qcow2"
    path.write_bytes(recorder.data)
    check_clean(path)


def test_a_flush_writes_the_mapping_alone(tmp_path: Path) -> None:
    recorder = Recorder(made(tmp_path).read_bytes())
    with qcow2x.open(recorder, "r+") as image:
        image.pwrite(b"x" * 512, 0)
        image.flush()
        path = tmp_path / "now.qcow2"
        path.write_bytes(recorder.data)
        # The data cluster is not counted on disk, its table is: as QEMU leaves it.
        found = qemu_check(path)
        assert found["corruptions"] == 2
        with qcow2x.open(path) as other:
            assert other.pread(512, 0) == b"x" * 512
        path.unlink()
        recorder.log.clear()
        image.pwrite(b"y" * 65536, 65536)
        image.flush()
        refblock = 2 * 65536
        assert not [
            e for e in recorder.log if e[0] == "write" and e[1] // 65536 == refblock // 65536
        ]


def test_without_the_feature_nothing_is_lazy_unless_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20)
    for lazy, dirty in ((None, False), (False, False), (True, True)):
        recorder = Recorder(path.read_bytes())
        with qcow2x.open(recorder, "r+", lazy_refcounts=lazy) as image:
            image.pwrite(b"x", 0)
            image.flush()
            assert is_dirty(recorder) == dirty
        assert not is_dirty(recorder)
    recorder = Recorder(made(tmp_path).read_bytes())
    with qcow2x.open(recorder, "r+", lazy_refcounts=False) as image:
        image.pwrite(b"x", 0)
        image.flush()
        assert not is_dirty(recorder)
    qcow2x.create(path, 1 << 20, compat="0.10")
    with qcow2x.open(path, "r+", lazy_refcounts=True) as image:
        image.pwrite(b"x", 0)
        image.flush()
    check_clean(path)


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
@pytest.mark.parametrize("cluster_size", [512, 4096])
def test_a_cut_of_power_at_any_instant(tmp_path: Path, cluster_size: int, cache: str) -> None:
    recorder = fresh(tmp_path / "disk.qcow2", cluster_size=cluster_size, lazy_refcounts=True)
    session = Session(recorder, "lazy", cache=cache)
    for _ in range(40):
        session.step()
    session.image.close()
    session._settled()
    end = tmp_path / "end.qcow2"
    end.write_bytes(recorder.data)
    check_clean(end)
    compare_bytes(end, session.model)
    for n, (happened, state) in enumerate(recorder.crashes(random.Random(4), 2)):
        crashed = Recorder(state)
        before = Header.load(crashed.pread, crashed.size(), "crashed")
        if not before.dirty:
            # Without the bit the image must be as sound as any other.
            with qcow2x.open(crashed) as image:
                found = image.check()
                assert not found.corruptions and not found.check_errors, happened
        with qcow2x.open(crashed, "r+") as image:
            assert (image.rebuilt is not None) == before.dirty
            found = image.check()
            assert not found.corruptions and not found.check_errors, (happened, found.findings)
            session.assert_plausible(happened, image.pread(image.size, 0))
        if n % 60 == 0:
            path = tmp_path / "crashed.qcow2"
            path.write_bytes(state)
            qemu_img("check", "-r", "all", path, code=None)
            check_clean(path)


def test_verbs_that_need_the_counts_find_them(tmp_path: Path) -> None:
    path = made(tmp_path)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"a" * 300_000, 0)
        assert image.check().clean
        image.pwrite(b"b" * 300_000, 400_000)
        image.snapshots.create("one")
        image.pwrite(b"c" * 100_000, 0)
        assert image.check().clean
        image.snapshots.delete("one")
        image.pwrite(b"d" * 100_000, 700_000)
        image.resize(2 << 20)
        qcow2x.amend(image, refcount_bits=32)
        image.pwrite(b"e" * 100_000, 900_000)
        assert image.check().clean
        model = image.pread(image.size, 0)
    check_clean(path)
    compare_bytes(path, model)


def test_amending_down_leaves_no_dirty_bit_behind(tmp_path: Path) -> None:
    path = made(tmp_path)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"a" * 300_000, 0)
        image.write_zeroes(0, 65536)
        qcow2x.amend(image, compat="0.10")
        image.pwrite(b"b" * 300_000, 500_000)
        model = image.pread(image.size, 0)
    check_clean(path)
    compare_bytes(path, model)


def test_a_dirty_bit_that_cannot_be_written_refuses_the_write(tmp_path: Path) -> None:
    recorder = Recorder(made(tmp_path).read_bytes())
    image = qcow2x.open(recorder, "r+")
    recorder.failing = range(recorder.calls + 1, recorder.calls + 2)
    with pytest.raises(OSError):
        image.pwrite(b"x", 0)
    with pytest.raises(OSError):
        image.close()
    with qcow2x.open(Recorder(recorder.data)) as after:
        assert after.check().clean
        assert not any(after.pread(64 * KiB, 0))
