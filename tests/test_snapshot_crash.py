"""A cut of power at any call of making, applying, deleting a snapshot, or of amending refcounts: the
next opening for writing mends the image; disk and snapshots hold what one side of the step says."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support.qemu import qemu_check
from support.recorder import Recorder
from support.stamps import stamped

import qcow2x

SIZE = 192 << 10

Step = Callable[[qcow2x.Image], object]
STEPS: dict[str, Step] = {
    "create": lambda image: image.snapshots.create("new"),
    "apply": lambda image: image.snapshots.apply("old"),
    "delete": lambda image: image.snapshots.delete("old"),
    "amend": lambda image: qcow2x.amend(image, refcount_bits=32),
}
SHAPES = {
    "512": {"cluster_size": 512},
    "4 KiB, 64-bit refcounts": {"cluster_size": 4096, "refcount_bits": 64},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
}


def contents(image: qcow2x.Image) -> dict[str, bytes]:
    """The disk ("") and every snapshot by name."""
    found = {"": image.pread(image.size, 0)}
    for snapshot in image.snapshots:
        with image.snapshots.open(snapshot.id) as then:
            found[snapshot.name] = then.pread(then.size, 0)
    return found


@pytest.mark.leaks("power was cut")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", STEPS)
def test_either_side_of_the_step(tmp_path: Path, step: str, shape: str) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, SIZE, **SHAPES[shape])  # type: ignore[arg-type]
    with qcow2x.open(path, "r+") as image:
        image.pwrite(stamped(0, SIZE // 2, 1), 0)
        image.pwrite_compressed(stamped(SIZE // 2, 32 << 10, 2), SIZE // 2)
        image.snapshots.create("old")
        image.pwrite(stamped(0, SIZE // 4, 3), SIZE // 8)
        image.discard(0, 16 << 10)
    cut_everywhere(path, STEPS[step], random.Random(f"{step} {shape}"))


@pytest.mark.leaks("power was cut")
@pytest.mark.parametrize("backed", [False, True])
def test_either_side_of_taking_zero_flags_out_of_snapshots(tmp_path: Path, backed: bool) -> None:
    path, base = tmp_path / "disk.qcow2", tmp_path / "base.raw"
    options = {}
    if backed:
        base.write_bytes(stamped(0, SIZE, 9))
        options = {"backing_file": str(base), "backing_format": "raw"}
    qcow2x.create(path, SIZE, cluster_size=4096, **options)  # type: ignore[arg-type]
    with qcow2x.open(path, "r+", references="follow") as image:
        image.pwrite(stamped(0, SIZE // 2, 1), 0)
        image.snapshots.create("data")
        image.write_zeroes(SIZE // 4, SIZE // 2)
        image.snapshots.create("zeros")
        image.pwrite(stamped(0, SIZE // 4, 3), SIZE // 8)
    cut_everywhere(path, lambda image: qcow2x.amend(image, compat="0.10"), random.Random(backed))


def cut_everywhere(path: Path, step: Step, rng: random.Random) -> None:
    recorder = Recorder(path.read_bytes())
    with qcow2x.open(recorder, "r+", references="follow") as image:
        before = contents(image)
        step(image)
        after = contents(image)
    states = 0
    for happened, state in recorder.crashes(rng, 8):
        states += 1
        crashed = Recorder(state)
        with qcow2x.open(crashed, "r+", references="follow") as image:
            assert contents(image) in (before, after), happened
            assert not image.info().dirty
            found = image.check()
            assert not found.corruptions and not found.check_errors, (happened, found.findings)
            # It goes on as a sound image does.
            image.pwrite(b"on and on", 5000)
            image.snapshots.create("and on")
        if states % 40 == 0:
            path.write_bytes(crashed.data)
            said = qemu_check(path)
            assert not said.get("corruptions") and not said["check-errors"], said
    assert states >= 40
