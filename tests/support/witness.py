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
heard = {"opened and found clean": 0, "opened and found to leak": 0, "read equal": 0}


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


def testify(path: Path, *, leaks: bool = False, passphrase: str | None = None) -> str | None:
    """What is wrong with the image, if anything is. Leaked clusters are not, with ``leaks``; an
    encrypted image is looked at if ``passphrase`` opens it."""
    image: list[object] = ["-f", "qcow2", path]
    key = None
    if _is_encrypted(path):
        if passphrase is None:
            return None
        key = passphrase
        opts = f"driver=qcow2,file.filename={path},encrypt.key-secret=key"
        image = ["--object", f"secret,id=key,data={key}", "--image-opts", opts]
    fingerprint = _fingerprint(path)
    if fingerprint in _seen:
        return None
    status, said = _qemu_img(path.parent, "check", "-U", *image)
    if any(excuse in said for excuse in _NOT_THERE):
        return None
    if status and not (leaks and status == 3):
        return f"qemu-img check {path}: {said}"
    heard["opened and found clean" if status == 0 else "opened and found to leak"] += 1
    if path.stat().st_blocks * 512 <= READ_UP_TO:
        said = _reads_equal(path, image, key)
        if said not in (None, _TOO_LONG):
            return f"{path}: {said}"
        heard["read equal"] += said is None
    _seen.add(fingerprint)
    return None


#: What it names was never there, or is gone, and it was made to look at the name; or a passphrase was
#: taken out of it.
_NOT_THERE = ("Could not open backing file", "Could not open data file", "Invalid password")
#: A disk of terabytes that a raw file cannot be.
_TOO_LONG = "File too large"


def _reads_equal(path: Path, image: list[object], key: str | None) -> str | None:
    raw = path.with_name(f".{path.name}.witness")
    try:
        status, said = _qemu_img(path.parent, "convert", "-U", *image, "-O", "raw", raw)
        if status:
            return _TOO_LONG if _TOO_LONG in said else said
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            with qcow2x.open(path, references="follow", lock=False, key=key) as ours:
                found = qcow2x.compare(ours, raw, second_format="raw")
        finally:
            os.chdir(here)
        return None if found.identical else f"differs from what QEMU reads: {found}"
    finally:
        raw.unlink(missing_ok=True)


def _qemu_img(folder: Path, *words: object) -> tuple[int, str]:
    # A data file's name counts from the working folder.
    done = subprocess.run(
        [tool("qemu-img"), *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, (done.stderr or done.stdout).strip()


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
