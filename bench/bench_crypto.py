"""LUKS in the page cache, beside qemu-io on a copy of the same image.

qemu-img bench cannot be told a key, so QEMU's requests are commands to qemu-io: one after another,
and sixteen at once, which it encrypts on up to four threads of its own.
qemu-io's own work, on an image without encryption, is a fifth to a tenth of what is measured.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FEW_ROUNDS

import qcow2x

SIZE = 256 << 20
KEY = "bench"
AT_ONCE = 16


class QemuIo:
    """Requests by qemu-io, without the time that it takes to begin and to open the image."""

    def __init__(self, path: Path) -> None:
        options = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename={path}"
        self.command = ["qemu-io", "--object", f"secret,id=s,data={KEY}", "-t", "writeback"]
        self.command += ["--image-opts", options]

    def seconds(self, commands: list[str]) -> float:
        return self.wall(commands) - self.wall([])

    def wall(self, commands: list[str]) -> float:
        start = time.perf_counter()
        told = "\n".join([*commands, "quit", ""])
        subprocess.run(self.command, input=told, text=True, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    def one_by_one(self, verb: str, length: int) -> float:
        return self.seconds([f"{verb} -q {off} {length}" for off in range(0, SIZE, length)])

    def many_at_once(self, verb: str, length: int) -> float:
        commands = []
        for number, off in enumerate(range(0, SIZE, length), 1):
            commands.append(f"aio_{verb} -q {off} {length}")
            if number % AT_ONCE == 0:
                commands.append("aio_flush")
        return self.seconds(commands)


@pytest.fixture(scope="module")
def luks(folder: Path) -> Iterator[tuple[qcow2x.Image, QemuIo]]:
    ours, theirs = folder / "luks.qcow2", folder / "luks-copy.qcow2"
    qcow2x.create(ours, SIZE, encryption=qcow2x.Encryption(KEY, iter_time_ms=10))
    with qcow2x.open(ours, "r+", key=KEY) as image:
        for off in range(0, SIZE, 1 << 20):
            image.pwrite(os.urandom(1 << 20), off)
    shutil.copyfile(ours, theirs)
    qemu = QemuIo(theirs)
    with qcow2x.open(ours, "r+", key=KEY) as image:
        yield image, qemu
    ours.unlink()
    theirs.unlink()


def go_through(image: qcow2x.Image, verb: str, length: int, start: int, end: int) -> None:
    buffer = bytearray(os.urandom(length))
    if verb == "read":
        for off in range(start, end, length):
            image.preadinto(buffer, off)
    else:
        for off in range(start, end, length):
            image.pwrite(buffer, off)


def time_ours(image: qcow2x.Image, verb: str, length: int, threads: int) -> float:
    part = SIZE // threads
    workers = [
        threading.Thread(target=go_through, args=(image, verb, length, at, at + part))
        for at in range(0, SIZE, part)
    ]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [64 << 10, 256 << 10, 1 << 20])
@pytest.mark.parametrize("verb", ["read", "write"])
def bench_luks(luks, versus, verb, length, threads):
    image, qemu = luks

    def one_round() -> dict[str, float]:
        return {
            "qcow2x": time_ours(image, verb, length, threads),
            "qemu-io": qemu.one_by_one(verb, length),
            f"qemu-io x{AT_ONCE}": qemu.many_at_once(verb, length),
        }

    who = "1 thread" if threads == 1 else f"{threads} threads"
    versus(
        f"LUKS {verb} {length >> 10} KiB, sequential, {who}",
        one_round,
        requests=SIZE // length,
        tags={"work": "luks"},
        at_most={"qemu-io": 0.67, f"qemu-io x{AT_ONCE}": 0.67},
        rounds=FEW_ROUNDS,
    )
