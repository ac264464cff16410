#!/usr/bin/env python3
"""Install the system packages that a job needs, if any is missing.

    python3 scripts/install_needs.py build test demo

The interpreter that runs this is the one qcow2x will be built for. Nothing is asked of the
package manager, and no rights are needed, when everything is there already.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from build_support import needs

JOBS = {
    "build": lambda: [*needs.missing_for_venv(), *needs.missing_for_build()],
    "test": lambda: [*needs.missing_programs("qemu-img", "mke2fs", "git"), *needs.missing_libnbd()],
    "iotests": lambda: [*needs.missing_programs("qemu-img"), *needs.missing_libnbd()],
    "demo": lambda: needs.missing_programs("qemu-img", "mke2fs"),
    "instructions": lambda: needs.missing_programs("valgrind"),
}


def main(jobs):
    missing = [need for job in jobs for need in JOBS[job]()]
    if not missing:
        return
    manager = next(
        (name for name in ("apt", "dnf") if shutil.which(f"{name}-get") or shutil.which(name)), None
    )
    packages = needs.packages(missing, manager) if manager else []
    if not packages or any(not need.apt for need in missing):
        sys.exit(needs.explain(missing, needs.read_os_release()))

    as_root = [] if os.geteuid() == 0 else ["sudo"]
    if as_root and not shutil.which("sudo"):
        sys.exit(needs.explain(missing, needs.read_os_release()))
    print("installing:", *packages, flush=True)
    if manager == "dnf":
        run([*as_root, "dnf", "install", "-y", *packages])
        return
    quiet = [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]
    retries = ["-o", "Acquire::Retries=3"]
    run([*quiet, *retries, "update"])
    run([*quiet, *retries, "install", "-y", "--no-install-recommends", *packages])


def run(command):
    status = subprocess.run(command).returncode
    if status:
        sys.exit(f"failed with status {status}: {' '.join(command)}")


if __name__ == "__main__":
    main(sys.argv[1:])
