"""Image locks: qcow2x, qemu-img and qemu-io keep out of each other's way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import qcow2x


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "locked.qcow2"
    qcow2x.create(path, 1 << 20)
    return path


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


@contextmanager
def opened_by_qemu(path: Path, *options: str) -> Iterator[None]:
    """The image held open by a qemu-io that has answered, so that it has its locks."""
    with subprocess.Popen(
        ["qemu-io", *options, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("length\n")
        child.stdin.flush()
        while "MiB" not in child.stdout.readline():
            pass
        yield
        child.stdin.write("quit\n")
        child.stdin.flush()


def test_writer_keeps_qemu_out(image: Path) -> None:
    with qcow2x.open(image, "r+"):
        assert run("qemu-img", "info", image).returncode == 1
        assert run("qemu-img", "info", "-U", image).returncode == 0
        assert run("qemu-io", "-c", "write 0 4k", image).returncode == 1
    assert run("qemu-io", "-c", "write 0 4k", image).returncode == 0


def test_readers_share_with_readers_and_keep_writers_out(image: Path) -> None:
    with qcow2x.open(image), qcow2x.open(image):
        assert run("qemu-img", "info", image).returncode == 0
        assert run("qemu-io", "-c", "write 0 4k", image).returncode == 1
        with pytest.raises(qcow2x.ImageLocked, match=r"locked\.qcow2"):
            qcow2x.open(image, "r+")
    qcow2x.open(image, "r+").close()


def test_qemu_writer_keeps_us_out(image: Path) -> None:
    with opened_by_qemu(image):
        for mode in ("r", "r+"):
            with pytest.raises(BlockingIOError, match="in use"):
                qcow2x.open(image, mode)
        qcow2x.open(image, lock=False).close()
    qcow2x.open(image, "r+").close()


def test_qemu_reader_shares_with_our_reader(image: Path) -> None:
    with opened_by_qemu(image, "-r"):
        qcow2x.open(image).close()
        with pytest.raises(qcow2x.ImageLocked):
            qcow2x.open(image, "r+")


def test_second_writer_in_the_same_process_is_refused(image: Path) -> None:
    with qcow2x.open(image, "r+"):
        with pytest.raises(qcow2x.ImageLocked):
            qcow2x.open(image, "r+")
        with pytest.raises(qcow2x.ImageLocked):
            qcow2x.open(image)


def test_backing_files_are_locked_against_writers(tmp_path: Path, image: Path) -> None:
    top = tmp_path / "top.qcow2"
    qcow2x.create(top, backing_file=image, backing_format="qcow2")
    with qcow2x.open(top, "r+", references="follow"):
        assert run("qemu-io", "-c", "write 0 4k", image).returncode == 1
        with qcow2x.open(image):
            pass
    assert run("qemu-io", "-c", "write 0 4k", image).returncode == 0


def test_a_lock_on_a_descriptor_handed_in_ends_with_the_image(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    try:
        with qcow2x.open(fd, "r+"):
            assert run("qemu-img", "info", image).returncode == 1
        assert run("qemu-img", "info", image).returncode == 0
    finally:
        os.close(fd)


def test_a_failed_open_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "no-image"
    path.write_bytes(b"not qcow2" * 100)
    with pytest.raises(qcow2x.FormatError):
        qcow2x.open(path, "r+")
    assert run("qemu-io", "-f", "raw", "-c", "write 0 512", path).returncode == 0


# Who holds the image, and who comes: for real, in processes of their own.
HOLDERS = {"qcow2x r": False, "qcow2x r+": True, "qemu-io -r": False, "qemu-io": True}
COMERS = {
    "qcow2x r": False,
    "qcow2x r+": True,
    "qcow2x lock=False": None,
    "qemu-img info": False,
    "qemu-img info -U": None,
    "qemu-io -r": False,
    "qemu-io": True,
}
_HOLD = """
import sys, qcow2x
with qcow2x.open(sys.argv[1], sys.argv[2]):
    print("have it", flush=True)
    sys.stdin.readline()
"""
_COME = """
import sys, qcow2x
try:
    qcow2x.open(sys.argv[1], sys.argv[2], lock=sys.argv[3] == "lock").close()
except qcow2x.ImageLocked:
    sys.exit(1)
"""


@contextmanager
def held(path: Path, holder: str) -> Iterator[None]:
    if holder.startswith("qemu-io"):
        with opened_by_qemu(path, *holder.split()[1:]):
            yield
        return
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, path, holder.split()[1]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "have it\n"
        yield
        child.stdin.write("\n")
        child.stdin.flush()


def come(path: Path, comer: str) -> bool:
    if comer.startswith("qcow2x"):
        mode = "r+" if comer.endswith("r+") else "r"
        lock = "no" if comer.endswith("False") else "lock"
        return run(sys.executable, "-c", _COME, path, mode, lock).returncode == 0
    if comer.startswith("qemu-img"):
        return run(*comer.split(), path).returncode == 0
    return run(*comer.split(), "-c", "length", path).returncode == 0


@pytest.mark.parametrize("holder", HOLDERS)
def test_matrix_of_holders_and_comers(image: Path, holder: str) -> None:
    with held(image, holder):
        got_in = {comer for comer in COMERS if come(image, comer)}
    # Readers share with readers; a writer shares with nobody; who takes no lock always gets in.
    expected = {
        comer
        for comer, writes in COMERS.items()
        if writes is None or not (writes or HOLDERS[holder])
    }
    assert got_in == expected
    assert all(come(image, comer) for comer in COMERS), "no lock is left behind"
