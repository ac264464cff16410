"""commit() and rebase() cut short, by a loss of power or by a call that fails: the overlay reads the
same at every instant, every layer is sound, and doing it again brings it to an end."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Any

import pytest
from campaigns.crash import run
from campaigns.power import Machine, RecordedFile
from support.stamps import stamped

import qcow2x

KiB = 1 << 10
SIZE = 64 * KiB
ERRORS = {"EIO": (errno.EIO, False), "ENOSPC": (errno.ENOSPC, False), "half": (errno.EIO, True)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("workload", ["commit", "rebase"])
def test_any_cut_of_power_leaves_the_overlay_as_it_reads(workload: str, seed: int) -> None:
    tally = run(workload, 40 + seed, qemu_every=30)
    assert not tally.failures
    assert tally.states > 10


class Layers:
    """A base, an overlay upon it and another base, each in a file that can be told to fail."""

    def __init__(self, **shape: Any) -> None:
        machine = Machine()
        self.files = {name: machine.file() for name in ("base", "top", "other")}
        below: dict[str, Any] = {}
        for number, name in enumerate(("base", "top")):
            qcow2x.create(self.files[name], SIZE - (1 - number) * 8 * KiB, **shape, **below)
            below = {"backing_file": "base", "backing_format": "qcow2"}
        qcow2x.create(self.files["other"], SIZE, **shape)
        for number, name in enumerate(self.files):
            with qcow2x.open(self.files[name], "r+", references=self.find) as image:
                for at in range(number * 4 * KiB, 48 * KiB, 12 * KiB):
                    image.pwrite(stamped(at, 5 * KiB, (number + 1) << 40), at)
        with qcow2x.open(self.files["top"], "r+", references=self.find) as image:
            image.write_zeroes(20 * KiB, 8 * KiB)
            image.pwrite(stamped(60 * KiB, 2 * KiB, 9 << 40), 60 * KiB)
        self.disk = self.read("top")

    def find(self, reference: qcow2x.Reference) -> RecordedFile:
        return self.files[reference.name]

    def read(self, name: str) -> bytes:
        with qcow2x.open(self.files[name], references=self.find) as image:
            return image.pread(image.size, 0)

    def settle(self) -> None:
        """As the next start of the machine finds it."""
        for file in self.files.values():
            file.failing = None
        for name, file in self.files.items():
            with qcow2x.open(file, "r+", references=self.find) as image:
                found = image.check()
                assert not found.corruptions, (name, found.findings[0])
        assert self.read("top") == self.disk

    def commit(self) -> None:
        qcow2x.commit(self.files["top"], references=self.find, threads=1)

    def rebase(self) -> None:
        qcow2x.rebase(
            self.files["top"], "other", backing_format="qcow2", references=self.find, threads=1
        )


def was_committed(layers: Layers) -> None:
    assert layers.read("base") == layers.disk
    with qcow2x.open(layers.files["top"], references=layers.find) as image:
        assert not any(run.depth == 0 and run.data for run in image.extents())


def was_rebased(layers: Layers) -> None:
    with qcow2x.open(layers.files["top"], references=layers.find) as image:
        assert image.info().backing_filename == "other"


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "shape",
    [
        {"cluster_size": 512},
        {"cluster_size": 4096, "compat": "0.10"},
        {"cluster_size": 16384, "extended_l2": True},
    ],
    ids=["512", "v2", "extl2"],
)
@pytest.mark.parametrize(
    "work, done", [(Layers.commit, was_committed), (Layers.rebase, was_rebased)]
)
def test_a_call_that_fails_loses_nothing(
    work: Callable[[Layers], None],
    done: Callable[[Layers], None],
    shape: dict[str, Any],
    error: str,
) -> None:
    whole = Layers(**shape)
    before = {name: file.calls for name, file in whole.files.items()}
    work(whole)
    calls = {name: file.calls - before[name] for name, file in whole.files.items()}
    done(whole)
    rng = random.Random(f"{shape} {error}")
    failed = 0
    for name in ("base", "top"):
        for k in sorted(rng.sample(range(1, calls[name] + 1), min(12, calls[name]))):
            layers = Layers(**shape)
            file = layers.files[name]
            file.failing = range(file.calls + k, file.calls + k + 1)
            file.error, file.half_written = ERRORS[error]
            try:
                work(layers)
            except OSError:
                failed += 1
            layers.settle()
            work(layers)
            layers.settle()
            done(layers)
    assert failed
