"""QEMU's tools, run and read. They are the oracle of these tests: one that is missing is a failure."""

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

Path_ = str | os.PathLike[str]
#: Long enough for a slow, shared machine; a tool that takes longer hangs.
TIMEOUT = 120


@cache
def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.fail(
            f"{name} is not installed, and these tests compare with it: "
            "sudo apt install qemu-utils (Fedora: sudo dnf install qemu-img)",
            pytrace=False,
        )
    return path


#: What QEMU says when it wants to know how fast it is, to make a key, and the machine is busy.
NO_CLOCK = "Unable to get accurate CPU usage"


def patiently(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs one of QEMU's tools, again and again where all that it lacks is a steady clock."""
    for _ in range(20):
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        if NO_CLOCK not in done.stderr:
            break
    return done


def run(name: str, *args: object, code: int | None = 0) -> str:
    """Runs a tool and returns what it printed; its exit code must be ``code`` unless None."""
    command = [tool(name), *map(str, args)]
    done = patiently(command)
    said = done.stdout + done.stderr
    assert code is None or done.returncode == code, f"{' '.join(command)}: {said}"
    return done.stdout


def qemu_img(*args: object, code: int | None = 0) -> str:
    return run("qemu-img", *args, code=code)


def qemu_io(path: Path_, *commands: str, fmt: str = "qcow2") -> str:
    """Runs qemu-io commands on an image. qemu-io exits with 0 after some failures, so what it says
    is looked at as well."""
    flags = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", fmt, *flags, path)
    assert "failed" not in said.lower(), said
    return said


def qemu_check(path: Path_) -> dict[str, Any]:
    """What ``qemu-img check`` finds, as its JSON says it."""
    found = json.loads(qemu_img("check", "-f", "qcow2", "--output=json", path, code=None))
    assert isinstance(found, dict)
    return found


def check_clean(path: Path_) -> None:
    """No leak, no corruption, nothing that could not be checked."""
    found = qemu_check(path)
    kinds = ("leaks", "corruptions", "check-errors")
    if any(found.get(kind) for kind in kinds):
        pytest.fail(f"{path}: {qemu_img('check', '-f', 'qcow2', path, code=None)}")


def compare(path: Path_, raw: Path_, fmt: str = "qcow2") -> None:
    """QEMU reads the same bytes from the image as from a raw file, and the same length."""
    said = qemu_img("compare", "-f", fmt, "-F", "raw", path, raw)
    assert "size mismatch" not in said, said


def compare_bytes(path: Path_, content: bytes | bytearray) -> None:
    """The same with the bytes at hand."""
    raw = Path(f"{os.fspath(path)}.expected")
    raw.write_bytes(content)
    try:
        compare(path, raw)
    finally:
        raw.unlink()


class Locked:
    """An image in whose chain the layers at ``depths``, 0 the topmost, are encrypted with ``key``."""

    def __init__(self, path: Path_, depths: list[int], key: str) -> None:
        options = ["driver=qcow2", f"file.filename={os.fspath(path)}"]
        options += [f"{'backing.' * depth}encrypt.key-secret=key" for depth in depths]
        self.path = path
        self._options = ("--object", f"secret,id=key,data={key}", "--image-opts")
        self._image = ",".join(options)

    def check_clean(self) -> None:
        said = qemu_img("check", *self._options, self._image)
        assert "No errors were found" in said, said

    def compare(self, content: bytes | bytearray) -> None:
        raw = Path(f"{os.fspath(self.path)}.expected")
        raw.write_bytes(content)
        plain = f"driver=raw,file.filename={raw}"
        try:
            said = qemu_img("compare", *self._options, self._image, plain)
            assert "size mismatch" not in said, said
        finally:
            raw.unlink()


def qemu_map(path: Path_) -> list[dict[str, Any]]:
    found = json.loads(qemu_img("map", "-f", "qcow2", "--output=json", path))
    assert isinstance(found, list)
    return found


def qemu_info(path: Path_) -> dict[str, Any]:
    found = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", path))
    assert isinstance(found, dict)
    return found
