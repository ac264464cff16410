"""Reads through long chains: what each layer holds, hides and ends, and where layers may change."""

import random
from pathlib import Path

import pytest
from support.qemu import compare_bytes
from support.stamps import explain, noise

import qcow2x
from qcow2x.storage import FileStorage

KiB = 1 << 10
MiB = 1 << 20


def model_read(model: bytearray, size: int) -> bytearray:
    """What a layer of *size* bytes shows of the disk below it."""
    return bytearray(model[:size] + bytes(max(0, size - len(model))))


@pytest.mark.parametrize("seed", range(4))
def test_any_shape_of_chain_reads_as_its_layers_say(tmp_path: Path, seed: int) -> None:
    """Layers of other cluster sizes, with subclusters, shorter and longer than those below."""
    rng = random.Random(seed)
    model = bytearray()
    below: Path | None = None
    for n in range(12):
        path = tmp_path / f"{n}.qcow2"
        size = 2 * MiB + rng.randrange(-512, 512) * KiB + rng.randrange(2) * 512
        options = rng.choice([{"cluster_size": 512}, {"cluster_size": 4096}, {},
                              {"cluster_size": 2 * MiB}, {"extended_l2": True}])  # fmt: skip
        backing = {} if below is None else {"backing_file": below, "backing_format": "qcow2"}
        qcow2x.create(path, size, **options, **backing)
        model = model_read(model, size)
        with qcow2x.open(path, "r+", references="follow") as image:
            for i in range(rng.randrange(4)):
                off = rng.randrange(size - 512)
                length = min(size - off, rng.choice([512, 70 * KiB, 300 * KiB]))
                if rng.randrange(4):
                    data = noise(off, length, 100 * n + i)
                    image.pwrite(data, off)
                    model[off : off + length] = data
                else:
                    image.write_zeroes(off, length)
                    model[off : off + length] = bytes(length)
        below = path
    assert below is not None
    with qcow2x.open(below, "r+", references="follow") as image:
        size = len(model)
        for i in range(300):
            off = rng.randrange(size)
            length = min(size - off, rng.choice([1, 512, 4096, 64 * KiB, 200 * KiB, size]))
            if i % 10 == 9:
                data = noise(off, length, 10_000 + i)
                image.pwrite(data, off)
                model[off : off + length] = data
            got = image.pread(length, off)
            wanted = model[off : off + length]
            assert got == wanted, explain(off, got, wanted)
    compare_bytes(below, model)


def test_a_writable_layer_in_the_middle_is_always_asked(tmp_path: Path) -> None:
    """It may get what it did not hold when a read first passed by."""
    names = [tmp_path / f"{n}.qcow2" for n in range(4)]
    qcow2x.create(names[0], MiB)
    with qcow2x.open(names[0], "r+") as image:
        image.pwrite(b"bottom", 0)
    for lower, upper in zip(names, names[1:], strict=False):
        qcow2x.create(upper, backing_file=lower, backing_format="qcow2")
    with (
        qcow2x.open(names[2], "r+", references="follow") as middle,
        qcow2x.open(names[3], backing=middle) as top,
    ):
        assert top.pread(6, 0) == b"bottom"
        middle.pwrite(b"middle", 0)
        assert top.pread(6, 0) == b"middle"
        middle.write_zeroes(0, 64 * KiB)
        assert top.pread(6, 0) == bytes(6)


def test_layers_that_hold_nothing_are_not_asked_again(tmp_path: Path) -> None:
    """Counted by the loads of their metadata caches: one per layer, whatever is read."""
    below = tmp_path / "0.qcow2"
    qcow2x.create(below, 4 * MiB)
    with qcow2x.open(below, "r+") as image:
        image.pwrite(b"x" * MiB, 2 * MiB)
    for n in range(1, 30):
        path = tmp_path / f"{n}.qcow2"
        qcow2x.create(path, backing_file=below, backing_format="qcow2")
        with qcow2x.open(path, "r+", references="follow") as image:
            image.pwrite(b"y", 4 * MiB - n * 64 * KiB)
        below = path
    with qcow2x.open(below, references="follow", l2_cache_size=1) as image:
        for _ in range(3):
            for off in range(0, 4 * MiB, 64 * KiB):
                image.pread(512, off)
        # One table each.
        assert [layer.stats().l2_loads for layer in image.backing_chain] == [1] * 30


def test_a_raw_file_below_many_layers(tmp_path: Path) -> None:
    """It is the last to be asked, and may be shorter and change under us."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"r" * (100 * KiB + 1))
    below, format = raw, "raw"
    for n in range(3):
        path = tmp_path / f"{n}.qcow2"
        qcow2x.create(path, MiB, backing_file=below, backing_format=format)
        below, format = path, "qcow2"
    with qcow2x.open(below, references="follow") as image:
        assert image.pread(MiB, 0) == b"r" * (100 * KiB + 1) + bytes(MiB - 100 * KiB - 1)
        with FileStorage(raw, True) as storage:
            storage.pwrite(b"changed", 200 * KiB)
        assert image.pread(7, 200 * KiB) == b"changed"
