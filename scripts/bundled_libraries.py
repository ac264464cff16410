#!/usr/bin/env python3
"""Import every compiled module of the installed qcow2x and check where its C libraries came from.

Fails when one was loaded from the system although the wheel should have brought it.
"""

import importlib
import pkgutil
import re
import sys
from pathlib import Path

import qcow2x._core

BUNDLED = re.compile(r"/lib(zstd|isal|crypto|uring)[-.]")

for module in pkgutil.iter_modules(qcow2x._core.__path__, "qcow2x._core."):
    importlib.import_module(module.name)

wheel_folder = Path(qcow2x.__file__).parent.parent / "qcow2x.libs"
loaded = {
    line.split(maxsplit=5)[5]
    for line in Path("/proc/self/maps").read_text().splitlines()
    if BUNDLED.search(line)
}
foreign = sorted(path for path in loaded if Path(path).parent != wheel_folder)
if foreign:
    sys.exit("loaded from outside the wheel: " + ", ".join(foreign))
print(
    "C libraries from the wheel:", ", ".join(sorted(Path(path).name for path in loaded)) or "none"
)
