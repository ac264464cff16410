"""convert as a user types it: options, output, interrupts."""

from __future__ import annotations

import json
import os
import re
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

import qcow2x


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


# --- what qemu-img's users rely on ----------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    status = run(*args)
    return status, capsys.readouterr().err.replace("qcow2x:", "qemu-img:")


@pytest.mark.parametrize(
    "args",
    [
        ["-O", "qcow2", "disk.raw"],
        ["-n", "-o", "size=1", "disk.raw", "x"],
        ["--target-is-zero", "disk.raw", "x"],
        ["--target-image-opts", "disk.raw", "x"],
        ["--skip-broken-bitmaps", "disk.raw", "x"],
        ["-c", "-C", "disk.raw", "x"],
        ["-S", "4k", "-C", "disk.raw", "x"],
        ["-C", "--salvage", "disk.raw", "x"],
        ["-m", "17", "disk.raw", "x"],
        ["-S", "1000", "disk.raw", "x"],
        ["-r", "fast", "disk.raw", "x"],
        ["-t", "wrong", "disk.raw", "x"],
        ["-T", "wrong", "disk.raw", "x"],
        ["-l", "snapshot.wrong=1", "disk.raw", "x"],
        ["-O", "wrong", "disk.raw", "x"],
        ["-O", "qcow2", "-o", "wrong=1", "disk.raw", "x"],
        ["-O", "qcow2", "-B", "disk.raw", "disk.raw", "x"],
        ["-O", "qcow2", "-B", "disk.raw", "-F", "raw", "disk.raw", "disk.raw", "x"],
        ["-B", "disk.raw", "disk.raw", "x"],
        ["-n", "--target-is-zero", "-B", "b", "-O", "qcow2", "disk.raw", "x"],
        ["-c", "disk.raw", "x"],
        ["-c", "-O", "qcow2", "-o", "encrypt.format=luks", "disk.raw", "x"],
        ["-c", "-O", "qcow2", "-o", "preallocation=full", "disk.raw", "x"],
        ["--bitmaps", "-O", "qcow2", "-f", "raw", "disk.raw", "x"],
        ["--bitmaps", "-O", "qcow2", "disk.raw", "disk.raw", "x"],
        ["missing", "x"],
        ["disk.raw", "missing/x"],
        ["-n", "disk.raw", "missing"],
        ["-l", "one", "-f", "raw", "disk.raw", "x"],
        ["-O", "qcow2", "-o", "cluster_size=1000", "disk.raw", "x"],
    ],
    ids=" ".join,
)
def test_mistakes_are_told_in_the_same_words(
    raw: Path, args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # There is one that they call an error and do not count as one.
    theirs = qemu("qemu-img", "convert", *args, ok=(0, 1))
    assert theirs.stderr
    Path("x").unlink(missing_ok=True)
    assert told(capsys, "convert", *args) == (1, theirs.stderr)
    assert os.listdir() == ["disk.raw"]


def test_snapshots(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, "disk.qcow2")
    qemu_img("snapshot", "-c", "one", "disk.qcow2")
    qemu("qemu-io", "-c", "write -P 7 0 1M", "disk.qcow2")
    for name in (
        "one",
        "1",
        "snapshot.id=1",
        "snapshot.name=one",
        "snapshot.id=1,snapshot.name=one",
    ):
        assert run("convert", "-l", name, "-O", "qcow2", "disk.qcow2", "out.qcow2") == 0
        assert run("compare", "-q", raw, "out.qcow2") == 0
    capsys.readouterr()
    for name in ("two", "snapshot.id=2", "snapshot.id=1,snapshot.name=two"):
        assert told(capsys, "convert", "-l", name, "disk.qcow2", "x") == (
            1, "qemu-img: Failed to load snapshot: Can't find snapshot\n"
        )  # fmt: skip


def test_bitmaps(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, "disk.qcow2")
    qemu_img("bitmap", "--add", "disk.qcow2", "on")
    qemu_img("bitmap", "--add", "--disable", "-g", "32k", "disk.qcow2", "off")
    qemu("qemu-io", "-c", "write -P 7 1M 128k", "disk.qcow2")
    assert run("convert", "--bitmaps", "-O", "qcow2", "disk.qcow2", "out.qcow2") == 0
    with qcow2x.open("disk.qcow2") as old, qcow2x.open("out.qcow2") as new:
        assert dict(new.bitmaps) == dict(old.bitmaps)
        assert [e for e in new.bitmaps.extents("on") if e.dirty] == [
            e for e in old.bitmaps.extents("on") if e.dirty
        ]
    qemu_img("check", "out.qcow2")
    # Marked in use, as a writer that died leaves them.
    with open("disk.qcow2", "r+b") as file:
        data = bytearray(file.read())
        with qcow2x.open("disk.qcow2") as image:
            offset = image._header.bitmap_directory[0]
        data[offset + 15] |= 1
        file.seek(0)
        file.write(data)
    assert told(capsys, "convert", "--bitmaps", "-O", "qcow2", "disk.qcow2", "x") == (
        1,
        "qemu-img: Cannot copy inconsistent bitmap 'on'\n"
        "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it\n",
    )
    args = ["--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "disk.qcow2", "x"]
    assert told(capsys, "convert", *args) == (
        0, "qemu-img: warning: Skipping inconsistent bitmap 'on'\n"
    )  # fmt: skip
    with qcow2x.open("x") as image:
        assert list(image.bitmaps) == ["off"]


SECRET = ["--object", "secret,id=s,data=letmein"]


@pytest.mark.parametrize("format", ["luks", "qcow2"])
def test_encrypted_target_and_source(raw: Path, format: str) -> None:
    prefix = "encrypt." if format == "qcow2" else ""
    options = f"{prefix}key-secret=s,{prefix}iter-time=10"
    if format == "qcow2":
        options += ",encrypt.format=luks"
    assert run("convert", *SECRET, "-O", format, "-o", options, raw, "out") == 0
    opened = f"driver={format},{prefix}key-secret=s,file.filename=out"
    theirs = ["compare", "-q", *SECRET, "--image-opts", f"driver=raw,file.filename={raw}", opened]
    qemu_img(*theirs)
    assert run(*theirs) == 0
    assert run("convert", *SECRET, "--image-opts", opened, "-O", "raw", "back") == 0
    assert Path("back").read_bytes() == raw.read_bytes()
    # Into one that is there, whatever it held.
    qemu_img("create", "-q", "-f", "raw", "zeros.raw", "2M")
    args = ["-n", "--target-image-opts", "zeros.raw", opened]
    assert run("convert", *SECRET, *args) == 0
    with Path("back").open("r+b") as file:
        file.write(bytes(2 * MIB))
    qemu_img("compare", "-q", *SECRET, "--image-opts", "driver=raw,file.filename=back", opened)


def test_data_file(raw: Path) -> None:
    assert run("convert", "-O", "qcow2", "-o", "data_file=d,data_file_raw=on", raw, "out") == 0
    assert_qemu_agrees(Path("out"), raw)
    assert Path("d").read_bytes() == raw.read_bytes()


def test_salvage(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [0, 70_144, MIB + 4096, MIB + 4608]
    rules = [{"event": "none", "iotype": "read", "errno": 5, "sector": at // 512} for at in bad]
    rules.append({"event": "none", "iotype": "block-status", "errno": 5, "sector": 300})
    source = {
        "driver": "blkdebug",
        "image": {"driver": "raw", "file": {"driver": "file", "filename": str(raw)}},
        "inject-error": rules,
    }
    name = "json:" + json.dumps(source)
    assert told(capsys, "convert", name, "x")[0] == 1
    assert os.listdir() == ["disk.raw"]
    status, err = told(capsys, "convert", "--salvage", "-m", "4", "-O", "qcow2", name, "out")
    assert status == 0
    unknown = "qemu-img: warning: error while reading block status at offset 153600: "
    lines = [
        f"qemu-img: warning: error while reading offset {at}: Input/output error" for at in bad
    ]
    lines.insert(2, f"{unknown}Input/output error")
    assert err.splitlines() == [f"{unknown}Input/output error", *lines]
    expected = bytearray(raw.read_bytes())
    for at in bad:
        expected[at : at + 512] = bytes(512)
    with qcow2x.open("out") as image:
        assert image.pread(image.size, 0) == bytes(expected)
    assert run("convert", "--salvage", "-q", name, "out") == 0
    assert capsys.readouterr().err == ""


def test_errors_tell_the_first_byte(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = "inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.sector=4096"
    name = f"driver=blkdebug,image.driver=raw,image.file.filename={raw},{rule}"
    status, err = told(capsys, "convert", "--image-opts", name, "-O", "qcow2", "x")
    assert (status, err) == (
        1, "qemu-img: error while reading at byte 2097152: Input/output error\n"
    )  # fmt: skip


def test_copy_offload_and_rate_limit(raw: Path) -> None:
    for args in (["-C"], ["-C", "-O", "qcow2"], ["-r", "1G"]):
        assert run("convert", *args, raw, "out") == 0
        assert run("compare", "-q", raw, "out") == 0
    assert run("convert", "-C", "-f", "qcow2", "-O", "raw", "missing", "out") == 1
    assert run("convert", "-O", "qcow2", raw, "image.qcow2") == 0
    assert run("convert", "-C", "image.qcow2", "out.raw") == 0
    assert Path("out.raw").read_bytes() == raw.read_bytes()


def test_progress_on_a_signal(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(os.urandom(MIB) * 8)
    process = spawn("convert", "-r", "4M", "-O", "qcow2", source, tmp_path / "out.qcow2")
    assert process.stderr is not None
    deadline = time.monotonic() + 30
    while len(os.listdir(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == ""
    assert re.fullmatch(r" {4}\(\d+\.\d\d/100%\)\n", err)
