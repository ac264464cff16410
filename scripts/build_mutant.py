#!/usr/bin/env python3
"""A second build of the package, beside the one that is installed, which can leave one edge of the
order of writes out: python scripts/build_mutant.py [FOLDER]

For the mutation check of the crash tests (tests/campaigns/mutants.py) and nothing else. Only modules
that keep edges (include/qcow2x/edges.h) are compiled anew; the rest is copied.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("build", "mutant")


def build(folder: Path) -> None:
    """Makes or brings up to date the package below *folder*."""
    sys.path.insert(0, str(ROOT))
    from setuptools import Distribution

    from build_support.commands import BuildCore, core_extensions

    class BuildMutant(BuildCore):
        # Quick to compile: it is run for a minute or two.
        more_arguments = ("-DQ2_DROP_ORDER_EDGE", "-O1", "-g0")

    sys.path.remove(str(ROOT))
    spec = importlib.util.find_spec("qcow2x")
    if spec is None or spec.origin is None:
        raise SystemExit("qcow2x is to be installed or built in place first")
    shutil.copytree(
        Path(spec.origin).parent,
        folder / "qcow2x",
        ignore=shutil.ignore_patterns("__pycache__", *_names_of_mutants()),
        dirs_exist_ok=True,
    )
    os.chdir(ROOT)
    distribution = Distribution(
        {"ext_modules": [e for e in core_extensions() if _keeps_edges(Path(e.sources[0]))]}
    )
    distribution.get_command_obj("build").build_base = str(folder / "objects")
    command = BuildMutant(distribution)
    command.build_lib = str(folder)
    command.ensure_finalized()
    command.run()


def _keeps_edges(source: Path) -> bool:
    return "edges cimport" in source.read_text()


def _names_of_mutants() -> list[str]:
    core = ROOT / "qcow2x" / "_core"
    return [f"{pyx.stem}.*.so" for pyx in core.glob("*.pyx") if _keeps_edges(pyx)]


if __name__ == "__main__":
    build((ROOT / FOLDER if len(sys.argv) < 2 else Path(sys.argv[1])).resolve())
