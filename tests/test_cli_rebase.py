"""rebase as a user types it, beside qemu-img."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_helpers import qemu, qemu_img, qemu_io

from qcow2x.cli.img import main


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def info(name: str) -> tuple[str | None, str | None]:
    found = json.loads(qemu_img("info", "-U", "--output=json", name))
    return found.get("backing-filename"), found.get("backing-filename-format")


@pytest.fixture(autouse=True)
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """base <- mid <- top, each with a MiB of its own, and another."""
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "base", "4M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "mid")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top", "5M")
    qemu_img("create", "-q", "-f", "qcow2", "other", "3M")
    for number, name in enumerate(("base", "mid", "top", "other")):
        qemu_io(name, f"write -P {number + 1} {number % 3}M 1M")
    qemu_img("convert", "-O", "raw", "top", "expected")


@pytest.mark.parametrize(
    "args",
    [
        ["-b", "other", "-F", "qcow2"],
        ["-b", "base", "-F", "qcow2"],
        ["-b", "./base", "-F", "qcow2", "-t", "none", "-T", "none", "-q"],
        ["-b", ""],
        ["-b", "expected", "-F", "raw"],
        ["-c", "-b", "other", "-F", "qcow2", "-U"],
    ],
    ids=" ".join,
)
def test_the_disk_stays(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs").mkdir()
    for name in ("base", "mid", "top", "other", "expected"):
        shutil.copy(name, f"theirs/{name}")
    assert run("rebase", *args, "top") == 0
    assert capsys.readouterr() == ("", "")
    name = args[args.index("-b") + 1] or None
    assert info("top") == (name, "raw" if name == "expected" else "qcow2" if name else None)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", "top", "expected")
    qemu_img("check", "top")
    if "-c" in args:
        return
    qemu_img("rebase", *args, "theirs/top")
    assert allocated("top") == allocated("theirs/top")


def allocated(name: str) -> list[tuple[int, int, bool]]:
    runs: list[tuple[int, int, bool]] = []
    for one in json.loads(qemu_img("map", "--output=json", name)):
        mine = one["depth"] == 0 and one["data"]
        start = one["start"]
        if runs and runs[-1][2] == mine:
            runs[-1] = (runs[-1][0], start + one["length"], mine)
        else:
            runs.append((start, start + one["length"], mine))
    return runs


def test_unsafe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rebase", "-u", "-b", "no such file", "-F", "raw", "top") == 0
    assert info("top") == ("no such file", "raw")
    assert run("rebase", "-u", "top") == 0
    assert info("top") == (None, None)
    assert capsys.readouterr() == ("", "")


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rebase", "-p", "-b", "other", "-F", "qcow2", "top") == 0
    out = capsys.readouterr().out
    assert out.startswith("    (0.00/100%)\r")
    assert out.endswith("    (100.00/100%)\r\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["-b", "gone", "-F", "qcow2", "top"],
            "Could not open new backing file 'gone': Could not open 'gone': "
            "No such file or directory",
        ),
        (
            ["-b", "other", "top"],
            "Could not change the backing file to 'other': backing format must be specified",
        ),
        (
            ["-u", "-b", "other", "top"],
            "Could not change the backing file to 'other': backing format must be specified",
        ),
        (["-b", "other", "-F", "vmdx", "top"], "Invalid format name: 'vmdx'"),
        (["-t", "fast", "-b", "other", "top"], "Invalid cache option: fast"),
        (["-T", "fast", "-b", "other", "top"], "Invalid source cache option: fast"),
        (
            ["-f", "raw", "-u", "-b", "other", "-F", "raw", "expected"],
            "Could not change the backing file to 'other': Operation not supported",
        ),
        (
            ["-u", "-b", "n" * 1024, "-F", "raw", "top"],
            f"Could not change the backing file to '{'n' * 1024}': Invalid argument",
        ),
        (
            ["-c", "-f", "raw", "-b", "", "expected"],
            "Compression not supported for this file format",
        ),
    ],
)
def test_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(args[-1]).read_bytes()
    assert run("rebase", *args) == 1
    assert capsys.readouterr().err == f"qcow2x-img: {message}\n"
    assert Path(args[-1]).read_bytes() == before
    if "-c" not in args and "n" * 1024 not in args:
        assert qemu("qemu-img", "rebase", *args, ok=(1,)).stderr == f"qemu-img: {message}\n"


def test_a_header_without_room(capsys: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "small", "1M")
    before = Path("small").read_bytes()
    name = "n" * 400
    assert run("rebase", "-u", "-b", name, "-F", "raw", "small") == 1
    said = f"Could not change the backing file to '{name}': No space left in the file header"
    assert capsys.readouterr().err == f"qcow2x-img: {said}\n"
    assert Path("small").read_bytes() == before


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["top"], ["-b", "other"], ["-b", "other", "top", "more"]):
        assert run("rebase", *args) == 1
        theirs = qemu("qemu-img", "rebase", *args, ok=(1,)).stderr
        assert capsys.readouterr().err == theirs.replace("qemu-img", "qcow2x-img")
