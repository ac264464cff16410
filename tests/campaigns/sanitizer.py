"""Builds of the core that are watched by the compiler's sanitizers, each in a folder of its own, and
the interpreter that runs them.

Python itself is not built with a sanitizer, so its runtime is loaded ahead of everything. QEMU's
tools hang under one: what is loaded ahead is taken out of the environment again, and a Python that
a test starts (``sys.executable``) is the same watched one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
#: kind: the compiler's name of it, its runtime, the variable that sets it up, and how.
KINDS = {
    "asan": (
        "address,undefined",
        ("libasan.so", "libubsan.so"),
        {
            # Leaks: CPython keeps what it has till the end, on purpose.
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=1:"
            "allocator_may_return_null=1:quarantine_size_mb=32",
            "UBSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:print_stacktrace=1",
            # Overruns of Python's small objects are seen only if each is an allocation.
            "PYTHONMALLOC": "malloc",
        },
    ),
    "tsan": (
        "thread",
        ("libtsan.so",),
        # ${QCOW2X_TSAN}: where its reports go, as campaigns/race.py says.
        {
            "TSAN_OPTIONS": "halt_on_error=0:exitcode=66:history_size=4:second_deadlock_stack=1:"
            f"suppressions={Path(__file__).with_name('tsan.supp')}:${{QCOW2X_TSAN}}"
        },
    ),
}

_SITE = """\
import os
import sys

os.environ.pop("LD_PRELOAD", None)
sys.executable = {python!r}
"""


def folder(kind: str) -> Path:
    return SOURCE / "build" / kind


def build(kind: str) -> Path:
    """Builds what is out of date; returns the watched interpreter."""
    sanitizers, runtimes, options = KINDS[kind]
    base = folder(kind)
    env = dict(os.environ, QCOW2X_DEBUG="1", QCOW2X_SANITIZE=sanitizers)
    if kind == "asan":
        env["QCOW2X_COVERAGE"] = "1"
    command = ["setup.py", "--quiet", "build", "--build-base", base, "--build-lib", base / "lib"]
    log = base / "log"
    base.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as out:
        status = subprocess.run(
            [sys.executable, *map(str, command)], cwd=SOURCE, env=env, stdout=out, stderr=out
        ).returncode
    if status:
        raise SystemExit(f"the {kind} build failed:\n{log.read_text()[-4000:]}")
    ahead = [_runtime(name) for name in runtimes]
    if kind == "asan":
        ahead.append(str(_coverage_library(base)))
    return _interpreter(kind, base, ahead, options)


def _runtime(name: str) -> str:
    found = subprocess.run(
        ["gcc", f"-print-file-name={name}"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"gcc has no {name}: install the sanitizers' runtime")
    return found


def _coverage_library(base: Path) -> Path:
    source, library = Path(__file__).with_name("coverage.c"), base / "libcoverage.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        flags = ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]
        subprocess.run(["gcc", *flags, "-o", library, source], check=True)
    return library


def _interpreter(kind: str, base: Path, ahead: list[str], options: dict[str, str]) -> Path:
    site = base / "site"
    site.mkdir(exist_ok=True)
    python = base / "python"
    (site / "sitecustomize.py").write_text(_SITE.format(python=str(python)))
    path = [site, base / "lib", SOURCE / "tests"]
    settings = {
        **options,
        "LD_PRELOAD": " ".join(ahead),
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        # Which build this is; campaigns say it, and skip what only another one shows.
        "QCOW2X_WATCHED": kind,
    }
    words = [f'{name}="{value}"' for name, value in settings.items()]
    # ThreadSanitizer wants its part of the address space where it always is; containers may not let
    # us, and then mostly it is there by itself.
    straight = ["setarch", "-R"] if kind == "tsan" else []
    if straight and (not shutil.which("setarch") or subprocess.run([*straight, "true"]).returncode):
        straight = []
    script = f'#!/bin/sh\nexec env {" ".join(words)} {" ".join(straight)} {sys.executable} "$@"\n'
    if not python.exists() or python.read_text() != script:
        python.write_text(script)
        python.chmod(0o755)
    return python
