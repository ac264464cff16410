"""``qcow2x-img``: a stand-in for qemu-img under any name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import qemu

from qcow2x.cli.main import IMG_COMMANDS


def start(name: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Our program, called by the name of a link that a user made."""
    if not name.exists():
        name.write_text(
            f"#!{sys.executable}\nimport sys\nfrom qcow2x.cli.img import main\nsys.exit(main())\n"
        )
        name.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([name, *args], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nonsense"],
        ["--nonsense"],
        ["-T"],
        ["info", "--nonsense", "x"],
        ["info", "-f"],
        ["info", "--output"],
        ["info"],
        ["info", "a", "b"],
        ["check"],
        ["create"],
        ["compare", "a"],
    ],
    ids=" ".join,
)
def test_mistakes_are_told_as_qemu_img_tells_them(args: list[str], tmp_path: Path) -> None:
    theirs = qemu("qemu-img", *args, ok=(0, 1, 2))
    ours = start(tmp_path / "qemu-img", *args)
    assert (ours.stdout, ours.stderr, ours.returncode) == (
        theirs.stdout,
        theirs.stderr,
        theirs.returncode,
    )


def test_name_stands_before_messages_and_in_help(tmp_path: Path) -> None:
    assert start(tmp_path / "my-img", "x").stderr.startswith("my-img: Command not found: x\n")
    assert start(tmp_path / "my-img", "--help").stdout.startswith("usage: my-img <command>")
    assert start(tmp_path / "my-img", "info", "-h").stdout.startswith("usage: my-img info ")
    assert start(tmp_path / "qemu-img", "-V").stdout.startswith("qemu-img version 10.0 (qcow2x ")


def test_trace_is_accepted(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(512))
    told = start(tmp_path / "qemu-img", "-T", "qcow2_*", "info", "--output=json", str(disk))
    assert (told.returncode, told.stderr) == (0, "")
    assert '"format": "raw"' in told.stdout


def test_help_lists_every_command(tmp_path: Path) -> None:
    lines = start(tmp_path / "qemu-img", "--help").stdout.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(IMG_COMMANDS)
