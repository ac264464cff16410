"""Internal snapshots and info of a large image, beside qemu-img on the same file.

The image's metadata is preallocated, so that a snapshot has something to do: 16 million references
at 1 TiB. QCOW2X_BENCH_SIZE sets another size in GiB.
"""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from conftest import FEW_ROUNDS

import qcow2x

SIZE_GIB = int(os.environ.get("QCOW2X_BENCH_SIZE", "1024"))


def timed(*command: object) -> float:
    start = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def large(folder):
    path = folder / "large.qcow2"
    timed("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path,
          f"{SIZE_GIB}G")  # fmt: skip
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def rounds(large):
    """Create and delete, ours and QEMU's in turn: (create, delete) seconds by who."""
    taken: list[dict[str, tuple[float, float]]] = []
    for _ in range(FEW_ROUNDS):
        with qcow2x.open(large, "r+") as image:
            times = []
            for call in (image.snapshots.create, image.snapshots.delete):
                start = time.perf_counter()
                call("bench")
                times.append(time.perf_counter() - start)
        theirs = (
            timed("qemu-img", "snapshot", "-c", "bench", large),
            timed("qemu-img", "snapshot", "-d", "bench", large),
        )
        taken.append({"qcow2x": (times[0], times[1]), "qemu-img": theirs})
    return taken


@pytest.mark.parametrize("step", ["create", "delete"])
def bench_snapshot(versus, rounds, step):
    """Durable at return in both: qemu-img flushes before it ends."""
    which = ("create", "delete").index(step)
    taken = iter(rounds)

    def one_round() -> dict[str, float]:
        return {who: times[which] for who, times in next(taken).items()}

    versus(
        f"snapshot {step}, {SIZE_GIB} GiB of metadata",
        one_round,
        tags={"work": "snapshot", "plot": "image"},
        rounds=len(rounds),
        warm_up=False,
    )


@pytest.mark.parametrize("images", [1, 16])
def bench_info(versus, large, images):
    """What a program that shells out pays, and what one that embeds does: for one image now and then
    (the processor has forgotten the way), and for a list of them."""

    def one_round() -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(images):
            with qcow2x.open(large) as image:
                image.info()
        ours = time.perf_counter() - start
        theirs = sum(timed("qemu-img", "info", "--output=json", large) for _ in range(images))
        return {"qcow2x": ours, "qemu-img": theirs}

    versus(
        "info of one image" if images == 1 else f"info of {images} images",
        one_round,
        requests=images,
        at_most={"qemu-img": 0.05} if images > 1 else None,
    )
