"""QEMU as a witness: every image that a test leaves behind is one it opens, finds clean and reads as
qcow2x does."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import qcow2x
from support.qemu import TIMEOUT, tool

MAGIC = b"QFI\xfb"
#: Host bytes of an image up to which its whole disk is read. A few tests make larger ones, to look at
#: tables; of those the tables are checked.
READ_UP_TO = 64 << 20

#: SHA-256 of images that were found good; many tests begin with the same one.
_seen: set[bytes] = set()
heard = {"opened and found clean": 0, "read equal": 0}


def images_in(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(where, name)
            if path.is_file() and not path.is_symlink() and _is_image(path):
                yield path


def _is_image(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(104)
    except OSError:
        return False
    # Not even QEMU looks further than the magic and the version for what is whose.
    return len(head) >= 72 and head[:4] == MAGIC and head[4:8] in (b"\0\0\0\2", b"\0\0\0\3")


def _is_encrypted(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(36)[32:36] != bytes(4)


def testify(path: Path) -> str | None:
    """What is wrong with the image, if anything is."""
    if _is_encrypted(path):
        # It wants the key; the tests of encryption have QEMU read theirs with it.
        return None
    fingerprint = _fingerprint(path)
    if fingerprint in _seen:
        return None
    said = _qemu_img(path.parent, "check", "-U", "-f", "qcow2", path)
    if said is not None and "Could not open backing file" in said:
        # What it names was never there, or is gone: it was made to look at the name.
        return None
    if said is not None:
        return f"qemu-img check {path}: {said}"
    heard["opened and found clean"] += 1
    if path.stat().st_blocks * 512 <= READ_UP_TO:
        said = _reads_equal(path)
        if said is not None:
            return f"{path}: {said}"
        heard["read equal"] += 1
    _seen.add(fingerprint)
    return None


def _reads_equal(path: Path) -> str | None:
    raw = path.with_name(f".{path.name}.witness")
    try:
        said = _qemu_img(path.parent, "convert", "-U", "-f", "qcow2", "-O", "raw", path, raw)
        if said is not None:
            return said
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            found = qcow2x.compare(
                path,
                raw,
                first_format="qcow2",
                second_format="raw",
                references="follow",
                lock=False,
            )
        finally:
            os.chdir(here)
        return None if found.identical else f"differs from what QEMU reads: {found}"
    finally:
        raw.unlink(missing_ok=True)


def _qemu_img(folder: Path, *words: object) -> str | None:
    # A data file's name counts from the working folder.
    done = subprocess.run(
        [tool("qemu-img"), *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    return (done.stderr or done.stdout).strip() if done.returncode else None


def _fingerprint(path: Path) -> bytes:
    """Of all that the image's content hangs on; of one that names others, of itself in its place."""
    with open(path, "rb") as file:
        head = file.read(104)
        backing = any(head[8:16])
        data_file = head[4:8] == b"\0\0\0\3" and head[79] & 4
        if backing or data_file or path.stat().st_blocks * 512 > READ_UP_TO:
            return os.fsencode(path)
        sha = hashlib.sha256(head)
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.digest()
