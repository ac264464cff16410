"""The programs that the demo and the benchmarks put qcow2x beside."""

from __future__ import annotations

import os
import shutil
import subprocess

NEEDED = {"qemu-img": "qemu-utils", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs"}

# Debian keeps the ext4 tools where only root's PATH looks.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class DemoFailure(Exception):
    """Something is missing or came out wrong; the message is for the person who runs the demo."""


def require_programs() -> None:
    """Raises DemoFailure naming every program that is missing and the packages that have it."""
    missing = [name for name in NEEDED if shutil.which(name, path=_PATH) is None]
    if missing:
        packages = " ".join(sorted({NEEDED[name] for name in missing}))
        raise DemoFailure(
            f"{', '.join(missing)} not found; on Debian or Ubuntu: sudo apt install {packages}"
        )


def run(*command: str | os.PathLike[str]) -> str:
    """Runs a program and returns what it printed; DemoFailure if it ends with an error."""
    words = [os.fspath(word) for word in command]
    found = shutil.which(words[0], path=_PATH)
    if found is None:
        raise DemoFailure(f"{words[0]} not found")
    done = subprocess.run(
        [found, *words[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C", "DEBUGFS_PAGER": "cat"},
    )
    if done.returncode:
        raise DemoFailure(f"{' '.join(words)} failed ({done.returncode}):\n{done.stdout.strip()}")
    return done.stdout
