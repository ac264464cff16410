"""convert as a user types it: options, output, interrupts."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
from cli_helpers import (
    MIB,
    assert_qemu_agrees,
    disk_bytes,
    qemu,
    qemu_img,
    run,
    spawn,
    write_sparse,
)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_sparse(tmp_path / "disk.raw", disk_bytes())


@pytest.mark.parametrize(
    "options",
    [
        ["-O", "qcow2"],
        ["-c", "-O", "qcow2", "-m", "2"],
        ["-c", "-O", "qcow2", "--level", "9"],
        ["-O", "qcow2", "-o", "cluster_size=4k,refcount_bits=8", "-o", "compat=1.1"],
        ["-c", "-O", "qcow2", "-o", "compression_type=zstd", "-W"],
        ["-O", "qcow2", "-o", "size=5M", "-t", "none", "-T", "none"],
        ["-q", "-f", "raw", "-O", "qcow2", "-S", "64k"],
        ["-O", "qcow2", "-S", "0"],
    ],
    ids=" ".join,
)
def test_convert(raw: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", *options, raw, "out.qcow2") == 0
    assert capsys.readouterr() == ("", "")
    assert_qemu_agrees(Path("out.qcow2"), raw)
    assert run("convert", "-O", "raw", "out.qcow2", "back.raw") == 0
    assert run("compare", "-q", raw, "back.raw") == 0


def test_default_target_is_raw_as_with_qemu_img(raw: Path) -> None:
    assert run("convert", raw, "out") == 0
    assert Path("out").read_bytes() == raw.read_bytes()


def test_progress(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "-p", "-O", "raw", raw, "out") == 0
    out = capsys.readouterr().out
    assert out.startswith("    (0.00/100%)\r")
    assert out.endswith("    (100.00/100%)\r\n")
    assert run("convert", "-p", "-q", "-O", "raw", raw, "out") == 0
    assert capsys.readouterr().out == ""


def test_existing_target(raw: Path) -> None:
    assert run("convert", "-n", "-O", "qcow2", raw, "missing.qcow2") == 1
    qemu_img("create", "-q", "-f", "qcow2", "there.qcow2", "5M")
    assert run("convert", "-n", "-O", "qcow2", raw, "there.qcow2") == 0
    qemu_img("compare", raw, "there.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "there.qcow2", "5M")
    assert run("convert", "-n", "--target-is-zero", "-c", "-O", "qcow2", raw, "there.qcow2") == 0
    qemu_img("compare", raw, "there.qcow2")


def test_backing_file(raw: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, "base.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    qemu("qemu-io", "-c", "write -P 4 1M 64k", "top.qcow2")
    args = ["-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "top.qcow2"]
    assert run("convert", *args, "out.qcow2") == 0
    qemu_img("convert", *args, "theirs.qcow2")
    assert qemu_img("compare", "-s", "out.qcow2", "theirs.qcow2")
    assert "backing file: base.qcow2" in qemu_img("info", "out.qcow2")


@pytest.mark.parametrize(
    "args",
    [
        ["-O", "no-such", "disk.raw", "out"],
        ["-O", "raw", "-c", "disk.raw", "out"],
        ["-O", "qcow2", "-o", "unknown=1", "disk.raw", "out"],
        ["-O", "qcow2", "-o", "backing_file=base", "disk.raw", "out"],
        ["-O", "qcow2", "-c", "-o", "preallocation=full", "disk.raw", "out"],
        ["-O", "qcow2", "-t", "none,", "disk.raw", "out"],
        ["-O", "qcow2", "missing", "out"],
        ["-f", "qcow2", "-O", "qcow2", "disk.raw", "out"],
        ["-O", "raw", "disk.raw", "disk.raw"],
        ["-O", "raw", "disk.raw", "no/such/folder"],
    ],
    ids=" ".join,
)
def test_convert_refuses(raw: Path, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = raw.read_bytes()
    qemu("qemu-img", "convert", *args, ok=(1,))
    Path("out").unlink(missing_ok=True)
    assert run("convert", *args) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("qcow2x: ")
    assert captured.err.count("\n") == 1
    assert os.listdir() == ["disk.raw"]
    assert raw.read_bytes() == before


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
def test_interrupt_leaves_no_target(tmp_path: Path, number: int, status: int) -> None:
    # Slow enough to be caught in the middle: zlib's best level over noise and text.
    source = tmp_path / "source.raw"
    source.write_bytes((os.urandom(MIB // 2) + Path(__file__).read_bytes() * 100)[:MIB] * 96)
    target = tmp_path / "target.qcow2"
    target.write_bytes(b"old")
    process = spawn("convert", "-p", "-c", "--level", "9", "-O", "qcow2", source, target)
    assert process.stdout is not None
    # The bar's first line is printed before the first task; the temporary file is there then.
    process.stdout.read(5)
    deadline = time.monotonic() + 30
    while len(os.listdir(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir(tmp_path)) == 3
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    # Caught inside an exec of text (how dataclasses are made, while modules are still imported), an
    # interrupt has CPython end itself by the signal however it was handled; a shell sees the same.
    assert process.returncode in (status, -number), err
    assert err == ""
    assert "(100.00/100%)" not in out
    assert sorted(os.listdir(tmp_path)) == ["source.raw", "target.qcow2"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("options", [["-O", "qcow2"], ["-c", "-O", "qcow2"], ["-O", "raw"]])
def test_no_room_leaves_no_target(tmp_path: Path, options: list[str]) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(os.urandom(3 * MIB))

    def limit() -> None:
        # A file that cannot grow further, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    process = spawn("convert", *options, source, tmp_path / "target", preexec_fn=limit)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("qcow2x: ")
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == ["source.raw"]


def test_reader_that_goes_away_is_no_error_message(raw: Path) -> None:
    import subprocess
    import sys

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m qcow2x map --output=json {raw} | true"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
