#!/usr/bin/env python3
"""Print what pyproject.toml asks of pip: `build` for the build system, else the extra's name.

python3 scripts/requirements.py build test lint
"""

import sys
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())
groups = {
    "build": project["build-system"]["requires"],
    **project["project"]["optional-dependencies"],
}
for group in sys.argv[1:]:
    print("\n".join(groups[group]))
