"""What a program pays for before qcow2x does anything: the modules that are loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qcow2x

#: Modules of the standard library that take milliseconds each, most of them by what they import.
SLOW = {
    "ast",
    "base64",
    "collections",
    "contextlib",
    "ctypes",
    "dataclasses",
    "datetime",
    "enum",
    "functools",
    "inspect",
    "json",
    "logging",
    "re",
    "shutil",
    "signal",
    "subprocess",
    "tempfile",
    "threading",
    "typing",
    "uuid",
}


def loaded_by(statement: str) -> set[str]:
    """The modules that a statement loads in a fresh interpreter. Without site, as what an
    installation loads at its start is its own matter."""
    code = (
        "import sys, os\n"
        "before = set(sys.modules)\n"
        f"{statement}\n"
        "sys.stdout.flush()\n"
        "os.write(2, '\\n'.join(set(sys.modules) - before).encode())\n"
    )
    parent = str(Path(qcow2x.__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": parent},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    return set(done.stderr.split())


def test_import_loads_nothing_that_it_does_not_use() -> None:
    assert loaded_by("import qcow2x") <= {"__future__", "qcow2x", "qcow2x._version"}


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "overlay"])
def test_info_loads_neither_the_engine_nor_slow_modules(tmp_path: Path, backing: bool) -> None:
    path = tmp_path / "a.qcow2"
    qcow2x.create(path, 1 << 20)
    if backing:
        below, path = path, tmp_path / "b.qcow2"
        qcow2x.create(path, backing_file=below, backing_format="qcow2")
    loaded = loaded_by(
        f"from qcow2x.cli.img import main; assert not main(['info', '--output=json', {str(path)!r}])"
    )
    assert not loaded & SLOW
    assert not loaded & {"qcow2x._core.image", "qcow2x.image", "qcow2x.ops.create", "qcow2x.types"}


def test_opening_needs_no_code_generators() -> None:
    """Classes that are made from source text when they are imported."""
    assert not loaded_by("import qcow2x; qcow2x.open") & {"ast", "dataclasses", "inspect", "json"}
