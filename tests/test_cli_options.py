"""Command lines, sizes and the text the commands print."""

from __future__ import annotations

import json
import re
from importlib import import_module

import pytest
from cli_helpers import run, spawn

from qcow2x.cli.main import COMMANDS
from qcow2x.cli.options import Option, UsageError, parse, parse_size, split_options
from qcow2x.cli.text import ProgressBar, human_size, json_text


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("1k", 1024),
        ("1.5M", 3 << 19),
        ("0.1G", 107374182),
        ("2T", 2 << 40),
        ("7E", 7 << 60),
        ("0x200", 512),
        ("8E", 1 << 63),
        ("", None),
        ("-1", -1),
        ("-1k", None),
        ("16E", 1 << 64),
        ("1.5", None),
        ("1kk", None),
        ("M", None),
        ("1 M", None),
    ],
)
def test_parse_size(text: str, nbytes: int | None) -> None:
    assert parse_size(text) == nbytes


def test_option_lists() -> None:
    assert split_options(["a=1,b=x,,y", "a=2,flag"]) == {"a": "2", "b": "x,y", "flag": "on"}
    with pytest.raises(UsageError):
        split_options(["=1"])


def test_options_may_stand_anywhere() -> None:
    options = (Option("f", "format", "FMT", ""), Option("q", "quiet", None, ""))
    parsed = parse("x", "", options, ["one", "-qf", "raw", "two", "--", "-q"])
    assert parsed.args == ["one", "two", "-q"]
    assert parsed.value("format") == "raw"
    assert parsed.flag("quiet")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (200704, "196 KiB"),
        (197120, "192 KiB"),
        (1380352, "1.32 MiB"),
        (1 << 40, "1 TiB"),
        (9116319744, "8.49 GiB"),
    ],
)
def test_human_size(nbytes: int, text: str) -> None:
    assert human_size(nbytes) == text


def test_json_is_laid_out_as_qemu_does() -> None:
    value = {"a": [], "b": {}, "c": ["é", 'q"\n', True, None, 5], "d": {"e": "\U0001f600"}}
    text = json_text(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert text.startswith(
        '{\n    "a": [\n    ],\n    "b": {\n    },\n    "c": [\n        "\\u00E9"'
    )
    assert json_text("\udcff") == '"\\uFFFD"'


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(True) as bar:
        for done in (0, 1, 500, 505, 1000):
            bar(done, 1000, "x")
    assert capsys.readouterr().out == ("    (0.00/100%)\r    (50.00/100%)\r    (100.00/100%)\r\n")
    with ProgressBar(False) as bar:
        bar(1, 2, "x")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"demo"}))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: qcow2x {command} ")
    lines = out.splitlines()
    assert lines[2] == COMMANDS[command] + "."
    named = [line for line in lines if line.startswith("  ")]
    assert any(line.startswith("  -h, --help ") for line in named)
    for line in named:
        assert len(line) > 32 and line[31] == " ", f"no help text: {line}"
    # What a usage line names, in brackets or not, is told of, and the other way round.
    usage = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", lines[0]))
    told = [set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", line[:32])) for line in named]
    assert usage <= set().union(*told)
    assert [names for names in told if names and not names & usage] == [{"-h", "--help"}]


#: The options of QEMU 10.0's qemu-img: letters, and names that are more than a letter's other form.
QEMU_OPTIONS = {
    "amend": "o f t p q --object --image-opts --force",
    "bench": "c d f n i o q s S t w U --flush-interval --pattern --no-drain --image-opts",
    "bitmap": "b f F g --add --remove --clear --enable --disable --merge --object --image-opts",
    "check": "f r T q U --output --object --image-opts --format --repair --force-share",
    "commit": "f t b d p q r --object --image-opts",
    "compare": "f F T p q s U --object --image-opts",
    "convert": "f O B C c F o l S p t T q n m W U r --target-image-opts --salvage --target-is-zero "
    "--bitmaps --skip-broken-bitmaps --object --image-opts --force-share",
    "create": "F b f o q u --object",
    "dd": "f O U --object --image-opts --force-share",
    "info": "f U --format --output --backing-chain --object --image-opts",
    "map": "f s l U --format --output --start-offset --max-length --object --image-opts",
    "measure": "f O o l U --output --size --object --image-opts --force-share",
    "rebase": "f F b u p t T q U c --compress --object --image-opts --force-share",
    "resize": "f q --preallocation --shrink --object --image-opts",
    "snapshot": "l a c d q U --object --image-opts --force-share",
}


@pytest.mark.parametrize("command", QEMU_OPTIONS)
def test_no_option_of_qemu_img_lacks(command: str) -> None:
    options = import_module(f"qcow2x.cli.{command}").OPTIONS
    known = {option.short for option in options} | {f"--{option.long}" for option in options}
    assert set(QEMU_OPTIONS[command].split()) <= known


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["info"],
        ["info", "--bogus", "x"],
        ["info", "--output=xml", "x"],
        ["info", "missing file"],
        ["create"],
        ["create", "-f", "vmdk", "x", "1M"],
        ["create", "-f", "qcow2", "x", "1M", "2M"],
        ["create", "-f", "qcow2", "x", "lots"],
        ["create", "-f", "qcow2", "x", "99E"],
        ["create", "-f", "qcow2", "-o", "no=1", "x", "1M"],
        ["create", "-f", "qcow2", "-b", "y", "x", "1M"],
        ["map", "missing file"],
        ["check", "-r", "some", "x"],
        ["convert", "x"],
        ["convert", "-m", "0", "x", "y"],
        ["convert", "-S", "1000", "x", "y"],
        ["convert", "--target-is-zero", "x", "y"],
        ["resize", "x"],
        ["resize", "x", "big"],
        ["bench", "-c", "0", "x"],
        ["bench", "--flush-interval=5", "x"],
        ["bench", "--pattern=300", "-w", "x"],
        [],
    ],
    ids=" ".join,
)
def test_mistakes_are_told_in_one_line(
    args: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert run(*args) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    if args:
        message, *hint = captured.err.splitlines()
        assert message.startswith("qcow2x: ")
        assert len(hint) <= 2


def test_as_a_process() -> None:
    process = spawn("--version")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("qcow2x version ")


def test_info_imports_only_what_it_uses(tmp_path: object) -> None:
    import os
    import subprocess
    import sys

    code = (
        "import sys; from qcow2x.cli.main import main\n"
        "main(['info', sys.argv[1]])\n"
        "names = {n for n in sys.modules if n.startswith('qcow2x.')}\n"
        "names &= {'qcow2x.image', 'qcow2x.ops.convert', 'qcow2x.cli.convert', 'qcow2x._core.bulk'}\n"
        "sys.exit(' '.join(names) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, __file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "file format: raw" in done.stdout
