"""commit as a user types it, beside qemu-img."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cli_helpers import qemu, qemu_img, qemu_io

import qcow2x
from qcow2x.cli.img import main

MIB = 1 << 20


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.fixture(autouse=True)
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """base <- mid <- top, each with a MiB of its own."""
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "base", "4M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "mid")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top", "5M")
    for number, name in enumerate(("base", "mid", "top"), 1):
        qemu_io(name, f"write -P {number} {number}M 1M")


def depths(name: str) -> set[int]:
    found = json.loads(qemu_img("map", "--output=json", name))
    return {run["depth"] for run in found if run["data"]}


def test_into_the_backing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("commit", "top") == 0
    assert capsys.readouterr() == ("Image committed.\n", "")
    assert depths("top") == {1, 2}
    qemu_io("mid", "read -P 3 3M 1M", "read -P 0 4M 1M")
    qemu_io("top", "read -P 1 1M 1M", "read -P 2 2M 1M", "read -P 3 3M 1M")
    qemu_img("check", "mid")
    qemu_img("check", "top")


@pytest.mark.parametrize("base", ["base", "./base", "ABSOLUTE"])
def test_into_a_layer_further_down(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("top").read_bytes()
    name = str(tmp_path / "base") if base == "ABSOLUTE" else base
    assert run("commit", "-q", "-b", name, "-f", "qcow2", "-t", "none", "top") == 0
    assert capsys.readouterr() == ("", "")
    assert Path("top").read_bytes() == before
    qemu_io("base", "read -P 1 1M 1M", "read -P 2 2M 1M", "read -P 3 3M 1M", "read -P 0 4M 1M")


def test_drop(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("commit", "-d", "-r", "1G", "top") == 0
    assert capsys.readouterr().out == "Image committed.\n"
    assert depths("top") == {0, 1, 2}


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("commit", "-p", "top") == 0
    out = capsys.readouterr().out
    assert out.startswith("    (0.00/100%)\r")
    assert out.endswith("    (100.00/100%)\r\nImage committed.\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["base"], "Image does not have a backing file"),
        (["-b", "gone", "top"], "Did not find 'gone' in the backing chain of 'top'"),
        (["-b", "top", "top"], "Did not find 'top' in the backing chain of 'top'"),
        (["-t", "fast", "top"], "Invalid cache option: fast"),
        (["gone"], "Could not open 'gone': Could not open 'gone': No such file or directory"),
        (["-f", "raw", "top"], "Image does not have a backing file"),
    ],
)
def test_refused(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run("commit", *args) == 1
    assert capsys.readouterr().err == f"qcow2x-img: {message}\n"
    assert qemu("qemu-img", "commit", *args, ok=(1,)).stderr == f"qemu-img: {message}\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["top", "more"], []):
        assert run("commit", *args) == 1
        theirs = qemu("qemu-img", "commit", *args, ok=(1,)).stderr
        assert capsys.readouterr().err == theirs.replace("qemu-img", "qcow2x-img")
    assert run("commit", "-r", "much", "top") == 1
    theirs = qemu("qemu-img", "commit", "-r", "much", "top", ok=(1,)).stderr
    assert capsys.readouterr().err == theirs.replace("qemu-img", "qcow2x-img")


def test_base_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("top").read_bytes()
    with qcow2x.open("mid", "r", references="follow"):
        assert run("commit", "top") == 1
    assert capsys.readouterr().err.startswith('qcow2x-img: Failed to get "write" lock\n')
    assert Path("top").read_bytes() == before


def test_options_instead_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("commit", "--image-opts", "driver=qcow2,file.filename=top") == 0
    assert depths("top") == {1, 2}
    assert run("commit", "json:{'driver': 'qcow2', 'file.filename': 'mid'}") == 0
    assert depths("mid") == {1}
    assert capsys.readouterr().out == 2 * "Image committed.\n"


def test_no_room_in_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    limited = "json:" + json.dumps(
        {
            "driver": "qcow2",
            "file": {"driver": "raw", "size": 1 << 19, "file": {"driver": "file", "filename": "s"}},
        }
    )
    qemu_img("create", "-q", "-f", "qcow2", "s", "4M")
    subprocess.run(["truncate", "-s", "512K", "s"], check=True)
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", limited, "-F", "qcow2", "over", "4M")
    qemu_io("over", "write -P 7 0 2M")
    before = Path("over").read_bytes()
    assert run("commit", "over") == 1
    assert capsys.readouterr().err == "qcow2x-img: Block job failed: No space left on device\n"
    assert Path("over").read_bytes() == before
    qemu_img("check", "s")
    # Named by options, its base can be opened by the commands only.
    Path("over").unlink()
