"""Everything but the compiled core is declared in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

# A build backend does not look for modules beside setup.py.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.commands import HEADERS, Build, BuildCore, core_extensions

# The C headers live beside the package in the tree and inside it once installed.
INSTALLED_HEADERS = "qcow2x.include.qcow2x"

setup(
    packages=[*find_packages(include=["qcow2x", "qcow2x.*"]), INSTALLED_HEADERS],
    package_dir={INSTALLED_HEADERS: HEADERS},
    ext_modules=core_extensions(),
    cmdclass={"build": Build, "build_ext": BuildCore},
)
