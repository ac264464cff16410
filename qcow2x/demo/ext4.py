"""A real ext4 disk made from this machine's own files, and the tools that look into it."""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qcow2x.demo.programs import DemoFailure, run

SOURCES = ("/usr", "/opt", "/var/lib")
BLOCK = 4096
MIB = 1 << 20

#: Many small files cost time and show nothing that fewer do not.
MAX_FILES = 10_000
MAX_FILE_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Found:
    """One file of this machine that goes onto the disk."""

    path: str
    nbytes: int
    mode: int


@dataclass(frozen=True, slots=True)
class Gathered:
    """What was copied for the disk."""

    files: int
    nbytes: int
    #: How often the same files had to be taken to reach the size that was asked for.
    copies: int


def find_files(sources: tuple[str, ...], enough: int) -> Iterator[list[Found]]:
    """The readable files of each folder below *sources*, until *enough* bytes were seen.

    Only what everybody may read is taken: the demo has no business with anything else, also when
    root runs it.
    """
    seen = 0
    for source in sources:
        for folder, folders, names in os.walk(source):
            folders.sort()
            found = []
            for name in sorted(names):
                path = os.path.join(folder, name)
                try:
                    status = os.lstat(path)
                except OSError:
                    continue
                if (
                    stat.S_ISREG(status.st_mode)
                    and status.st_mode & stat.S_IROTH
                    and 0 < status.st_size <= MAX_FILE_BYTES
                    # Files that are mostly holes are not what they seem.
                    and status.st_blocks * 512 >= status.st_size // 2
                ):
                    found.append(Found(path, status.st_size, stat.S_IMODE(status.st_mode)))
            if found:
                seen += sum(file.nbytes for file in found)
                yield found
            if seen > enough:
                return


def gather(target: Path, wanted: int, sources: tuple[str, ...] = SOURCES) -> Gathered:
    """Copies at least *wanted* bytes of this machine's files below *target*, with their paths."""
    folders = list(find_files(sources, 3 * wanted))
    # Whole folders, taken from all over: a little of everything rather than all of one thing.
    random.Random(1).shuffle(folders)
    files = 0
    nbytes = 0
    copies = 0
    while nbytes < wanted:
        at_start = nbytes
        copies += 1
        root = target if copies == 1 else target / f"copy-{copies}"
        for found in folders:
            if nbytes >= wanted:
                break
            # Small files come in by the thousand: past the limit only folders of large ones do.
            if files > MAX_FILES and sum(f.nbytes for f in found) < len(found) * 256 * 1024:
                continue
            copied, copied_bytes = _copy_folder(found, root, wanted - nbytes)
            files += copied
            nbytes += copied_bytes
        if nbytes == at_start:
            raise DemoFailure(f"found too few readable files below {', '.join(sources)}")
    return Gathered(files, nbytes, copies)


def _copy_folder(found: list[Found], root: Path, wanted: int) -> tuple[int, int]:
    """Copies files of one folder until *wanted* bytes are there; returns how many and their bytes."""
    folder = root / os.path.dirname(found[0].path).lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    files = nbytes = 0
    for file in found:
        if nbytes >= wanted:
            break
        copy = folder / os.path.basename(file.path)
        try:
            shutil.copyfile(file.path, copy, follow_symlinks=False)
            copy.chmod(file.mode | stat.S_IRUSR | stat.S_IWUSR)
        except OSError:
            copy.unlink(missing_ok=True)
            continue
        files += 1
        nbytes += file.nbytes
    return files, nbytes


def make_disk(tree: Path, disk: Path, nbytes: int) -> None:
    """An ext4 file system of *nbytes* in the file *disk*, filled with what lies below *tree*."""
    run(
        "mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-m", "0", "-L", "qcow2x-demo",
        "-d", tree, disk, f"{nbytes // 1024}k",
    )  # fmt: skip


def disk_size_for(gathered: Gathered) -> int:
    """Room for the files with their last blocks, the journal, the tables and some to write to."""
    return (gathered.nbytes * 21 // 20 + gathered.files * BLOCK + 192 * MIB) // MIB * MIB


def fsck(disk: Path) -> str:
    """The summary line of a forced, read-only check; DemoFailure if it finds anything."""
    # fsck.ext4 by the name that says what it checks; "-n" answers no and opens read-only.
    report = run("fsck.ext4", "-fn", disk)
    if "WARNING" in report or "Fix?" in report:
        raise DemoFailure(f"fsck.ext4 -fn {disk}:\n{report}")
    return report.strip().splitlines()[-1].split(": ", 1)[-1]


def extents_of(disk: Path, name: str) -> list[tuple[int, int]]:
    """Where the file *name* inside the file system lies: (disk offset, bytes), in file order."""
    listing = run("debugfs", "-R", f"dump_extents -l {name}", disk)
    extents = []
    for line in listing.splitlines():
        match = re.match(
            r"\s*\d+/\s*\d+\s+\d+/\s*\d+\s+(\d+)\s*-\s*\d+\s+(\d+)\s*-\s*\d+\s+(\d+)", line
        )
        if match:
            _, physical, length = map(int, match.groups())
            extents.append((physical * BLOCK, length * BLOCK))
    if not extents:
        raise DemoFailure(f"debugfs finds no extents of {name} in {disk}:\n{listing}")
    return extents


def dump_file(disk: Path, name: str, copy: Path) -> None:
    """Copies the file *name* out of the file system in *disk*."""
    run("debugfs", "-R", f"dump {name} {copy}", disk)


def write_file(disk: Path, source: Path, name: str) -> None:
    """Lets ext4's own tools write the file *source* as *name* into the file system in *disk*."""
    report = run("debugfs", "-w", "-R", f"write {source} {name}", disk)
    if "Allocated inode" not in report:
        raise DemoFailure(f"debugfs cannot write {name} into {disk}:\n{report}")
