"""What the tests of convert, compare and the command share: QEMU's tools and disks with a story."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from support.qemu import patiently

from qcow2x.cli.main import main

MIB = 1 << 20


def qemu(tool: str, *args: object, ok: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run one of QEMU's tools; a status outside *ok* fails the test."""
    done = patiently([tool, *map(str, args)])
    assert done.returncode in ok, (done.args, done.returncode, done.stdout, done.stderr)
    return done


def qemu_img(*args: object, ok: tuple[int, ...] = (0,)) -> str:
    return qemu("qemu-img", *args, ok=ok).stdout


def qemu_io(image: object, *commands: str, format: str = "qcow2") -> None:
    args = [word for command in commands for word in ("-c", command)]
    qemu("qemu-io", "-f", format, *args, image)


def assert_qemu_agrees(image: Path, other: Path, other_format: str = "raw") -> None:
    """QEMU finds *image* clean, and the same disk as *other*."""
    qemu_img("check", image)
    qemu_img("compare", "-f", "qcow2", "-F", other_format, image, other)


def run(*args: object) -> int:
    """The command as a user types it, in this process."""
    return main([str(arg) for arg in args])


def spawn(*args: object, **options: object) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-m", "qcow2x", *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def disk_bytes(size: int = 3 * MIB + 123 * 512, seed: int = 1) -> bytes:
    """A disk with noise, text, zeros in every alignment and single bytes far from everything."""
    rng = random.Random(seed)
    disk = bytearray(size)

    def put(offset: int, data: bytes) -> None:
        room = max(0, size - offset)
        disk[offset : offset + len(data)] = data[:room]

    put(0, rng.randbytes(70_000))
    put(256 << 10, b"a line of text that repeats itself\n" * 9000)
    for at in range(MIB, MIB + (512 << 10), 12_288):
        put(at, rng.randbytes(4096))
    put(2 * MIB - 1, b"\x01\x02")
    put(2 * MIB + 300_001, b"x")
    put(size - 5, b"the end"[:5])
    return bytes(disk)


def write_sparse(path: Path, data: bytes) -> Path:
    """*data* as a file in which zero pages are holes."""
    with open(path, "wb") as out:
        for at in range(0, len(data), 4096):
            page = data[at : at + 4096]
            if page.strip(b"\0"):
                out.seek(at)
                out.write(page)
        out.truncate(len(data))
    return path
