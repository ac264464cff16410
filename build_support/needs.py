"""What a machine must have to build, test and show qcow2x, and the command that installs it.

Only the standard library is used, so that this runs before anything is installed. One table
serves both setup.py (which explains what is missing) and scripts/install_needs.py (which
installs it).
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("libzstd", "libisal", "libcrypto", "liburing", "zlib")


@dataclass(frozen=True)
class Need:
    """One thing that may be missing, in words and as the packages that bring it."""

    what: str
    apt: tuple[str, ...]
    dnf: tuple[str, ...]


_LIBRARY_NEEDS = {
    "libzstd": Need("libzstd (zstd clusters)", ("libzstd-dev",), ("libzstd-devel",)),
    "libisal": Need("ISA-L (deflate encoder)", ("libisal-dev",), ("isa-l-devel",)),
    "libcrypto": Need("OpenSSL libcrypto (encryption)", ("libssl-dev",), ("openssl-devel",)),
    "liburing": Need("liburing (queued I/O)", ("liburing-dev",), ("liburing-devel",)),
    "zlib": Need("zlib (tolerant inflate)", ("zlib1g-dev",), ("zlib-devel",)),
}

_PROGRAM_NEEDS = {
    "make": Need("make", ("make",), ("make",)),
    "git": Need("git", ("git",), ("git-core",)),
    "qemu-img": Need("QEMU's disk tools", ("qemu-utils",), ("qemu-img",)),
    "mke2fs": Need("the ext4 tools", ("e2fsprogs",), ("e2fsprogs",)),
    "valgrind": Need("valgrind", ("valgrind",), ("valgrind",)),
}


def pkg_config_command() -> list[str]:
    return shlex.split(os.environ.get("PKG_CONFIG", "pkg-config"))


def pkg_config(*arguments: str) -> list[str]:
    """What pkg-config answers, split as a shell would."""
    answer = subprocess.run(
        [*pkg_config_command(), *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return shlex.split(answer.stdout)


def missing_for_build() -> list[Need]:
    """The compiler, the Python headers, pkg-config and the libraries, as far as they lack."""
    missing = []
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if not shutil.which(compiler):
        missing.append(Need(f"a C compiler ({compiler})", ("gcc", "libc6-dev"), ("gcc",)))
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        missing.append(Need(f"the headers of this Python ({header})", *_python_packages("headers")))
    if not shutil.which(pkg_config_command()[0]):
        missing.append(Need("pkg-config", ("pkg-config",), ("pkgconf-pkg-config",)))
        # Nothing can tell which libraries are there, and asking twice helps nobody.
        missing.extend(_LIBRARY_NEEDS.values())
    else:
        missing.extend(_LIBRARY_NEEDS[name] for name in LIBRARIES if not _has_library(name))
    return missing


def missing_for_venv() -> list[Need]:
    """What `python -m venv` needs: Debian keeps it in a package of its own."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return [Need("Python's venv module", *_python_packages("venv"))]
    return []


def missing_programs(*names: str) -> list[Need]:
    # Debian keeps mke2fs where only root's PATH looks.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return [_PROGRAM_NEEDS[name] for name in names if not shutil.which(name, path=path)]


def missing_libnbd() -> list[Need]:
    """What the nbd driver loads when it is used."""
    try:
        ctypes.CDLL("libnbd.so.0")
    except OSError:
        return [Need("libnbd", ("libnbd0",), ("libnbd",))]
    return []


def _has_library(name: str) -> bool:
    return subprocess.run([*pkg_config_command(), "--exists", name]).returncode == 0


def _python_packages(part: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The packages of the running interpreter; none when it is not the distribution's own."""
    if sys.base_prefix != "/usr":
        return (), ()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if part == "headers":
        return (f"python{version}-dev",), ("python3-devel",)
    return (f"python{version}-venv",), ("python3-libs",)


def package_manager(os_release: str) -> str | None:
    """`apt`, `dnf`, or None when the text of /etc/os-release names neither family."""
    families = set()
    for line in os_release.splitlines():
        key, _, value = line.partition("=")
        if key in ("ID", "ID_LIKE"):
            families.update(value.strip().strip("\"'").split())
    if families & {"debian", "ubuntu"}:
        return "apt"
    if families & {"fedora", "rhel", "centos"}:
        return "dnf"
    return None


def read_os_release() -> str:
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
    return ""


def packages(missing: list[Need], manager: str) -> list[str]:
    names = (name for need in missing for name in getattr(need, manager))
    return list(dict.fromkeys(names))


def explain(missing: list[Need], os_release: str) -> str:
    """The message for a person: what is missing, and the exact command to type."""
    lines = ["", "qcow2x cannot be built, this machine lacks:"]
    lines += [f"  - {need.what}" for need in missing]
    manager = package_manager(os_release)
    if packages(missing, "apt"):
        lines += ["", "Install it with", ""]
        if manager in ("apt", None):
            note = "" if manager else "    (Debian, Ubuntu)"
            lines.append(f"    sudo apt install {' '.join(packages(missing, 'apt'))}{note}")
        if manager in ("dnf", None):
            note = "" if manager else "    (Fedora)"
            lines.append(f"    sudo dnf install {' '.join(packages(missing, 'dnf'))}{note}")
    if any(not need.apt for need in missing):
        lines += [
            "",
            f"{sys.executable} did not come from a package of this system: what it lacks of its",
            "own has to be installed the way it was, or use the system's python3.",
        ]
    lines += ["", "and run the same command again.", ""]
    return "\n".join(lines)


def require_toolchain() -> None:
    """End with one clear message when the machine cannot build qcow2x."""
    if platform.system() != "Linux":
        raise SystemExit("qcow2x is for Linux: it is built on Linux system calls and io_uring.")
    missing = missing_for_build()
    if missing:
        raise SystemExit(explain(missing, read_os_release()))
