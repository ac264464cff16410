"""``qcow2x-img``: a stand-in for qemu-img under any name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import qemu

from qcow2x.cli.main import IMG_COMMANDS


def start(
    name: Path, *args: str, stderr: int = subprocess.PIPE, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Our program, called by the name of a link that a user made; *settings* are for its
    environment."""
    if not name.exists():
        name.write_text(
            f"#!{sys.executable}\nimport sys\nfrom qcow2x.cli.img import main\nsys.exit(main())\n"
        )
        name.chmod(0o755)
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [name, *args],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **settings},
    )


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


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_messages_come_before_output_in_one_pipe(unbuffered: str, tmp_path: Path) -> None:
    """As with any program whose output C buffers: scripts that read both have seen it so."""
    rules = tmp_path / "rules"
    rules.write_text('[inject-error]\nevent = "read_aio"\nerrno = "5"\nonce = "off"\n')
    qemu("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "full", "1M")
    qemu("qemu-io", "-c", "write 0 512", tmp_path / "full")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "empty", "0")
    names = (f"blkdebug:{rules}:{tmp_path / 'full'}", str(tmp_path / "empty"))
    told = start(
        tmp_path / "qemu-img",
        "compare",
        *names,
        stderr=subprocess.STDOUT,
        PYTHONUNBUFFERED=unbuffered,
    )
    assert told.stdout == (
        f"qemu-img: Error while reading offset 0 of {names[0]}: Input/output error\n"
        "Warning: Image size mismatch!\n"
    )


def test_help_lists_every_command(tmp_path: Path) -> None:
    lines = start(tmp_path / "qemu-img", "--help").stdout.splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert named == [*IMG_COMMANDS, "-h,", "-V,", "-T,"]
