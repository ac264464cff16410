"""The examples of docs/qemu-img.md and the manual pages: they do what they say, with the programs
under QEMU's names and with QEMU's own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent
DOCUMENT = TREE / "docs" / "qemu-img.md"
PROGRAMS = {"qcow2x-img": "qcow2x.cli.img", "qcow2x-io": "qcow2x.cli.io"}


def blocks() -> list[tuple[str, str]]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return [(kind, body) for kind, body in found if kind in ("sh", "text")]


def linking() -> str:
    """The first example, which puts the programs in front of QEMU's."""
    return blocks()[0][1]


def examples() -> list[tuple[str, str]]:
    """Scripts, each with what it prints; in the order in which they go on from one another."""
    rest = blocks()[1:]
    return [(rest[n][1], rest[n + 1][1]) for n in range(0, len(rest), 2)]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user with an empty home, who has the programs on the path."""
    installed = tmp_path / "installed"
    installed.mkdir()
    for name, module in PROGRAMS.items():
        program = installed / name
        program.write_text(
            f"#!{sys.executable}\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
        )
        program.chmod(0o755)
    return {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def run_examples(first: str, folder: Path, environment: dict[str, str]) -> None:
    folder.mkdir()
    for number, (script, output) in enumerate(examples()):
        done = subprocess.run(
            ["bash", "-eu", "-c", (first if not number else 'PATH="$HOME/bin:$PATH"\n') + script],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.stdout, done.stderr, done.returncode) == (output, "", 0), script


def test_examples_work_by_way_of_a_link(tmp_path: Path, environment: dict[str, str]) -> None:
    run_examples(linking(), tmp_path / "ours", environment)
    for name in ("qemu-img", "qemu-io"):
        assert (tmp_path / "bin" / name).is_symlink()
    for image in (tmp_path / "ours").glob("*.qcow2"):
        subprocess.run(["qemu-img", "check", "-q", image], check=True)


def test_examples_print_the_same_with_qemus_own_tools(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    run_examples("", tmp_path / "theirs", environment)


def test_manual_pages_have_every_command_and_option(tmp_path: Path) -> None:
    if not (TREE / "scripts" / "make_man.py").exists():
        pytest.skip("needs the source tree")
    from importlib import import_module

    from qcow2x.cli.main import IMG_COMMANDS

    subprocess.run([sys.executable, TREE / "scripts" / "make_man.py", tmp_path], check=True, env={
        **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)
    })  # fmt: skip
    page = (tmp_path / "qcow2x-img.1").read_text().replace("\\-", "-")
    for name in IMG_COMMANDS:
        part = re.search(rf"^\.SS {name}\n(.*?)(?=^\.S[SH] )", page, re.MULTILINE | re.DOTALL)
        assert part is not None, name
        for option in import_module(f"qcow2x.cli.{name}").OPTIONS:
            assert (f"--{option.long}" if option.long else f"-{option.short}") in part.group(1)
    assert "DIFFERENCES FROM QEMU" in page
    commands = (tmp_path / "qcow2x-io.1").read_text()
    for name in ("read, r", "write, w", "aio_write", "reopen", "sleep"):
        assert f".SS {name}\n" in commands


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_manual_pages_are_laid_out_without_a_warning(tmp_path: Path) -> None:
    subprocess.run([sys.executable, TREE / "scripts" / "make_man.py", tmp_path], check=True, env={
        **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)
    })  # fmt: skip
    for name in PROGRAMS:
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-z", tmp_path / f"{name}.1"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.stderr, done.returncode) == ("", 0)
