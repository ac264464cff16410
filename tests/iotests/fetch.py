#!/usr/bin/env python3
"""Fetch the part of QEMU's source that holds its test suite and its image fuzzer, as a Debian source
package; and the qemu-nbd of that version, which some tests need besides our programs.

    fetch.py [--into DIR] [--mirror URI]

Nothing of QEMU is kept in this repository (it is under the GPL), so the suite comes from Debian when
it is run. apt downloads it, from the mirror that this machine is set up for, and checks signature
and checksums. Prints the folder; a second run finds it there and asks nobody.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

#: The Debian release whose QEMU it is, and the version that the expected results are for.
RELEASE = "trixie"
VERSION = "10.0"

CACHE = Path(__file__).resolve().parents[2] / ".iotests"
WANTED = ("tests/qemu-iotests/", "tests/image-fuzzer/", "python/qemu/", "VERSION")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class FetchError(Exception):
    """The source cannot be had; says what to do instead."""


def fetch(into: Path = CACHE, mirror: str | None = None) -> Path:
    """The folder of the unpacked source, downloaded if it is not there yet."""
    source = into / f"qemu-{VERSION}"
    if not all((source / wanted).exists() for wanted in WANTED):
        into.mkdir(parents=True, exist_ok=True)
        _unpack(_download(into / "apt", mirror or _own_mirror()), source)
    return source


def check_source(source: Path) -> Path:
    """The suite's folder in a source tree. Raises FetchError if there is none."""
    suite = source / "tests" / "qemu-iotests"
    if not (suite / "check").is_file():
        raise FetchError(f"{source} is no source tree of QEMU: it has no tests/qemu-iotests/check")
    return suite


def fetch_nbd(into: Path = CACHE, mirror: str | None = None) -> Path:
    """qemu-nbd of the suite's version, with all that it is linked with in a folder of its own, as the
    release that it is built for may be newer than this machine's. Raises FetchError."""
    root = into / f"programs-{VERSION}"
    if not root.is_dir():
        partial = root.with_name(root.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for package in _download_programs(into / "apt-programs", mirror or _own_mirror()):
            subprocess.run(["dpkg-deb", "--extract", package, partial], check=True)
        shutil.rmtree(into / "apt-programs")
        loaders = sorted(partial.glob("usr/lib/*/ld-linux*.so.*"))
        if not loaders or not (partial / "usr/bin/qemu-nbd").is_file():
            raise FetchError(f"Debian {RELEASE} has no qemu-nbd for this machine")
        libraries = root / loaders[0].parent.relative_to(partial)
        start = partial / "qemu-nbd"
        start.write_text(
            "#!/bin/sh\n"
            f'exec "{libraries / loaders[0].name}" --argv0 "$0" --library-path "{libraries}" '
            f'"{root}/usr/bin/qemu-nbd" "$@"\n'
        )
        start.chmod(0o755)
        os.replace(partial, root)
    return root / "qemu-nbd"


def _own_mirror() -> str:
    """The mirror from which this machine has its own Debian packages."""
    if not shutil.which("apt-get"):
        raise FetchError(
            _advice("the source comes by way of apt, which this machine does not have")
        )
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    own = _os_release()
    if own.get("ID") == "debian":
        for line in listed.stdout.splitlines():
            release, _, uri = line.partition(" ")
            if release in (own.get("VERSION_CODENAME"), "stable", "oldstable", "testing"):
                return uri
    raise FetchError(_advice("no Debian mirror stands in apt's configuration (--mirror names one)"))


def _os_release() -> dict[str, str]:
    pairs = (line.partition("=") for line in Path("/etc/os-release").read_text().splitlines())
    return {key: value.strip("\"'") for key, _, value in pairs}


def _download(apt: Path, mirror: str) -> Path:
    """Let apt fetch the source package; returns the tarball."""
    _run_apt(apt, mirror, "deb-src", ["source", "--download-only", "qemu"])
    tarballs = sorted((apt / "packages").glob(f"qemu_{VERSION}.*.orig.tar.*"))
    if not tarballs:
        raise FetchError(_advice(f"Debian {RELEASE} has no QEMU {VERSION} any more"))
    return tarballs[-1]


def _download_programs(apt: Path, mirror: str) -> list[Path]:
    """Let apt fetch QEMU's tools and every package that they need."""
    wanted = ["--no-install-recommends", "--download-only", "-y", "install", "qemu-utils"]
    _run_apt(apt, mirror, "deb", wanted)
    return sorted((apt / "archives").glob("*.deb"))


def _run_apt(apt: Path, mirror: str, kind: str, command: list[str]) -> None:
    """Let apt do something in the suite's release, with lists of its own and nothing installed."""
    for folder in ("lists/partial", "archives/partial", "packages"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    sources = apt / "debian.sources"
    entry = [f"Types: {kind}", f"URIs: {mirror}", f"Suites: {RELEASE}", "Components: main"]
    if KEYRING.exists():
        entry.append(f"Signed-By: {KEYRING}")
    sources.write_text("\n".join(entry) + "\n")
    (apt / "status").touch()
    settings = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt,
        # The folder may be one that only this user may enter.
        "APT::Sandbox::User": "root",
        "Acquire::Retries": 3,
        "Acquire::Languages": "none",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    for words in (["update", "--error-on=any"], command):
        print("apt-get", *words, f"({RELEASE}, {mirror})", file=sys.stderr, flush=True)
        done = subprocess.run(
            ["apt-get", "-q", *options, *words],
            cwd=apt / "packages",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.stderr.write(done.stdout)
            raise FetchError(_advice(f"apt-get {words[0]} failed (is there a network?)"))


def _unpack(tarball: Path, source: Path) -> None:
    """What the suite needs of the tarball; the rest, and what apt fetched, goes."""
    partial = source.with_name(source.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(tarball) as archive:
        for member in archive:
            _, _, name = member.name.partition("/")
            if name.startswith(WANTED):
                member.name = name
                archive.extract(member, partial, **_safely())
    check_source(partial)
    # One that an older version of this program fetched may have less.
    shutil.rmtree(source, ignore_errors=True)
    os.replace(partial, source)
    shutil.rmtree(tarball.parents[1])


def _safely() -> dict[str, str]:
    # Older releases of Python 3.10 and 3.11 do not know the argument; the signature was checked.
    return {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def _advice(problem: str) -> str:
    return (
        f"cannot fetch QEMU {VERSION}: {problem}.\n"
        "Unpack its source elsewhere and name the folder: make iotests SOURCE=DIR (or make fuzz-qemu), "
        "or run.py --source DIR."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--into", type=Path, default=CACHE, help="where it is kept")
    parser.add_argument("--mirror", help="URI of a Debian mirror (default: this machine's)")
    args = parser.parse_args()
    try:
        print(fetch(args.into, args.mirror))
    except FetchError as exc:
        print(f"fetch.py: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
