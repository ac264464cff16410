"""Requests that meet a change of the whole image half way: let in before it, planned after it."""

import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from campaigns.crowd import Round, Shape
from support.qemu import check_clean

import qcow2x
from qcow2x._core.header import Header
from qcow2x.storage import FileStorage

KiB = 1 << 10
MiB = 1 << 20


class AtTheGate:
    """A request on a thread of its own, which waits as the writers are frozen."""

    def __init__(self, image: qcow2x.Image, request: Callable[[], object]) -> None:
        self.image = image
        self.outcome: object = None
        self.thread = threading.Thread(target=self._run, args=(request,))
        image._freeze()
        self.thread.start()
        # Long enough to get there; should it not, it is refused at the door, and no test fails.
        time.sleep(0.1)
        assert self.thread.is_alive()

    def _run(self, request: Callable[[], object]) -> None:
        try:
            self.outcome = request()
        except Exception as exc:
            self.outcome = exc

    def let_go(self) -> object:
        self.image._thaw()
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.outcome


@pytest.mark.parametrize("request_", ["write", "zeros", "discard", "compressed"])
def test_a_disk_that_became_shorter_before_a_request_was_planned(
    tmp_path: Path, request_: str
) -> None:
    """The L1 table is shorter by then as well: nothing behind it is looked at."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 64 * KiB, cluster_size=512)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"old", 0)
        made = image.snapshots.create("short")
        image.resize(256 * MiB)
        at = 256 * MiB - 4096
        image.pwrite(b"far" * 100, at)
        requests = {
            "write": lambda: image.pwrite(b"late" * 1024, at),
            "zeros": lambda: image.write_zeroes(at, 4096),
            "discard": lambda: image.discard(at, 4096),
            "compressed": lambda: image.pwrite_compressed(bytes(4096), at),
        }
        late = AtTheGate(image, requests[request_])
        image.snapshots.apply(made.id)
        outcome = late.let_go()
        # To discard what is not there is to have it done.
        assert isinstance(outcome, ValueError) or request_ == "discard", outcome
        assert image.size == 64 * KiB
        image.resize(256 * MiB)
        assert image.pread(4096, at) == bytes(4096)
        assert image.pread(3, 0) == b"old"
    check_clean(path)


def test_what_is_mapped_behind_the_end_does_not_come_back_with_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"x" * MiB, 0)
    raw = bytearray(path.read_bytes())
    # As a writer leaves it that was let in before the disk became shorter.
    raw[24:32] = struct.pack(">Q", MiB // 2)
    path.write_bytes(raw)
    with qcow2x.open(path, "r+") as image:
        image.resize(MiB)
        assert image.pread(MiB, 0) == b"x" * (MiB // 2) + bytes(MiB // 2)
    check_clean(path)


def test_bitmaps_stay_as_they_are_while_they_are_changed(tmp_path: Path) -> None:
    """A write that waits does not mark them in use under the hands of who changes them."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.bitmaps.add("marks", 65536)
    with qcow2x.open(path, "r+") as image:
        late = AtTheGate(image, lambda: image.pwrite(b"late", 500_000))
        assert image._asleep
        with qcow2x.open(path, lock=False) as other:
            assert not other.bitmaps["marks"].in_use
        image.bitmaps.add("more", 4096)
        assert late.let_go() == 4
        assert not image._asleep
    with qcow2x.open(path) as image:
        assert {name: image.bitmaps[name].count for name in image.bitmaps} == {
            "marks": 65536,
            "more": 4096,
        }
    check_clean(path)


def test_a_closed_image_leaves_a_storage_that_stays_open_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    storage = FileStorage(path, writable=True)
    image = qcow2x.open(storage, "r+")
    image.pwrite(b"x", 0)
    image.close()
    before = path.read_bytes()
    for late in (
        lambda: image.snapshots.create("late"),
        lambda: image.bitmaps.add("late"),
        lambda: image.resize(2 * MiB),
        image.check,
        image.flush,
    ):
        with pytest.raises(ValueError, match="closed"):
            late()
    storage.close()
    assert path.read_bytes() == before


def test_a_header_of_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    data = path.read_bytes()
    sizes = iter((len(data) // 2, len(data)))
    assert Header.load(lambda n, at: data[at : at + n], lambda: next(sizes)).size == MiB
    with pytest.raises(qcow2x.CorruptImage):
        Header.load(lambda n, at: data[at : at + n], len(data) // 2)


@pytest.mark.parametrize("seed", [1, 2, 8, 10])
def test_everybody_at_once(tmp_path: Path, seed: int) -> None:
    """A short round of what ``make race`` does for as long as asked."""
    counts: Counter[str] = Counter()
    Round(tmp_path, Shape.of(seed), seed, counts, seconds=1).run()
    assert {"writes", "reads", "snapshots", "forks"} <= set(counts)
