"""The demo from beginning to end: a real disk goes into qcow2, is written to, comes back, and then
the same writes race on a raw file, on qcow2x and on QEMU."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import qcow2x
from qcow2x.demo import ext4, race, rounds
from qcow2x.demo.programs import DemoFailure, run
from qcow2x.demo.report import Report, human, race_chart

MIB = 1 << 20
DATABASE = "database"
PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for."""

    folder: Path
    #: Bytes of files on the disk.
    size: int
    keep: bool
    plot: Path
    #: Seconds that the race may take, about.
    race_seconds: float


def bytes_needed(size: int) -> int:
    """Free disk space for a demo with *size* bytes of files: the disk and the copy of its files,
    or later the disk, two images and two disks made from them."""
    return 5 * (size * 11 // 10 + 320 * MIB) + 256 * MIB


def tell(options: Options, report: Report) -> None:
    """Runs the demo. Raises DemoFailure at the first thing that is not as it should be."""
    start = time.monotonic()
    free = shutil.disk_usage(options.folder).free
    if free < bytes_needed(options.size):
        raise DemoFailure(
            f"{options.folder} has {human(free)} free and the demo needs "
            f"{human(bytes_needed(options.size))}: choose another place with --dir, or less "
            "with --size"
        )
    folder = Path(tempfile.mkdtemp(prefix="qcow2x-demo-", dir=options.folder))
    try:
        report.line(
            f"qcow2x {qcow2x.__version__}: {human(options.size)} of this machine's files, "
            f"{len(os.sched_getaffinity(0))} CPUs, in {folder}"
        )
        story = _Story(folder, options, report)
        story.make_disk()
        story.compress()
        story.write_in_overlay()
        story.bring_back()
        story.race()
    finally:
        if options.keep:
            report.line(f"\nKept: {folder}")
        else:
            shutil.rmtree(folder)
    report.line(f"\nEverything above was verified. {time.monotonic() - start:.0f} s in all.")


class _Story:
    def __init__(self, folder: Path, options: Options, report: Report) -> None:
        self.folder = folder
        self.options = options
        self.report = report
        self.raw = folder / "disk.raw"
        self.base = folder / "disk.qcow2"
        self.overlay = folder / "overlay.qcow2"
        #: What the guest's database file must hold.
        self.model = bytearray()

    def remove(self, *paths: Path) -> None:
        if not self.options.keep:
            for path in paths:
                path.unlink()

    # ---- The disk ----

    def make_disk(self) -> None:
        report, size = self.report, self.options.size
        report.step("A real disk")
        tree = _staging(self.folder, size)
        database = max(MIB, min(64 * MIB, size // 16))
        self.model = bytearray(random.Random(7).randbytes(database))
        try:
            with report.doing("gather files") as said:
                gathered = ext4.gather(tree, size)
                (tree / DATABASE).write_bytes(self.model)
                said.append(f"{gathered.files} files, {human(gathered.nbytes)}")
                if gathered.copies > 1:
                    said.append(f"taken {gathered.copies} times over to have enough")
            with report.doing("mke2fs -d") as said:
                ext4.make_disk(tree, self.raw, ext4.disk_size_for(gathered) + database)
                said.append(f"disk.raw, {human(self.raw.stat().st_size)}")
        finally:
            shutil.rmtree(tree)
        self._fsck(self.raw)

    def _fsck(self, disk: Path) -> None:
        with self.report.doing(f"fsck.ext4 -fn {disk.name}") as said:
            said.append(f"clean ({ext4.fsck(disk)})")

    # ---- Compression ----

    def compress(self) -> None:
        report = self.report
        report.step("Raw to compressed qcow2")
        start = time.perf_counter()
        with report.doing("qcow2x convert -c") as said:
            qcow2x.convert(self.raw, self.base, src_format="raw", compress=True)
            seconds = time.perf_counter() - start
            stored = self.raw.stat().st_blocks * 512
            said.append(f"{human(stored)} -> {human(self.base.stat().st_size)}")
            said.append(f"{stored / MIB / seconds:.0f} MiB/s")
        self._qemu_compresses()
        self._check(self.base)
        with report.doing("qemu-img compare, every byte") as said:
            run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", self.raw, self.base)
            said.append("identical")

    def _qemu_compresses(self) -> None:
        """A part is enough for a rate, and QEMU's takes a while."""
        part, image = self.folder / "part.raw", self.folder / "part.qcow2"
        wanted = min(128 * MIB, self.options.size // 4)
        with self.raw.open("rb") as disk, part.open("wb") as copy:
            # From amid the files; the end of the disk is empty.
            disk.seek(self.options.size // 4)
            for _ in range(wanted // PIECE):
                copy.write(disk.read(PIECE))
        for name, convert in (
            ("qemu-img", lambda: run(
                "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", part, image)),
            ("qcow2x", lambda: qcow2x.convert(part, image, src_format="raw", compress=True)),
        ):  # fmt: skip
            start = time.perf_counter()
            with self.report.doing(f"the same of {human(wanted)} by {name}") as said:
                convert()
                seconds = time.perf_counter() - start
                said.append(human(image.stat().st_size))
                said.append(f"{wanted / MIB / seconds:.0f} MiB/s")
            image.unlink()
        part.unlink()

    def _check(self, image: Path) -> None:
        with self.report.doing(f"qemu-img check {image.name}") as said:
            run("qemu-img", "check", "-q", "-f", "qcow2", image)
            said.append("clean")
        with self.report.doing(f"qcow2x check {image.name}") as said:
            with qcow2x.open(image, references="follow") as opened:
                result = opened.check()
            if not result.clean:
                raise DemoFailure(f"qcow2x check {image}: {result}")
            said.append("clean")

    # ---- The overlay ----

    def write_in_overlay(self) -> None:
        report = self.report
        report.step("An overlay, and a guest that writes to it")
        qcow2x.create(self.overlay, None, backing_file=self.base.name, backing_format="qcow2")
        extents = ext4.extents_of(self.raw, f"/{DATABASE}")
        with qcow2x.open(self.overlay, "r+", references="follow") as image:
            count = min(4000, len(self.model) // 4096)
            with report.doing(f"{count} random 4 KiB writes into the file /{DATABASE}"):
                self._write_database(image, extents, 4096, count)
            count = min(512, len(self.model) // 2 // 65536)
            with report.doing(f"{count} sequential 64 KiB writes into it"):
                self._write_database(image, extents, 65536, count)
            image.flush()
            with report.doing("read it back through the overlay") as said:
                if read_file(image, extents) != self.model:
                    raise DemoFailure(f"/{DATABASE} does not read back as it was written")
                said.append("every byte as written")
        self._check(self.overlay)
        self._write_through_ext4()

    def _write_database(
        self, image: qcow2x.Image, extents: list[tuple[int, int]], nbytes: int, count: int
    ) -> None:
        chance = random.Random(nbytes)
        for i in range(count):
            blocks = len(self.model) // nbytes
            at = (chance.randrange(blocks) if nbytes == 4096 else i) * nbytes
            data = chance.randbytes(nbytes)
            self.model[at : at + nbytes] = data
            for start, length, disk_off in pieces(extents, at, nbytes):
                image.pwrite(data[start : start + length], disk_off)

    def _write_through_ext4(self) -> None:
        """ext4's own tools add a file to a raw copy of the disk; the blocks that they changed,
        bitmaps and inodes and all, are written to the overlay as a guest would have."""
        report = self.report
        self.flat = self.folder / "flat.raw"
        with report.doing("qcow2x convert, overlay and backing file -> flat.raw") as said:
            qcow2x.convert(self.overlay, self.flat, dst_format="raw", references="follow")
            said.append(human(self.flat.stat().st_blocks * 512))
        letter = self.folder / "letter"
        letter.write_bytes(random.Random(3).randbytes(min(8 * MIB, len(self.model))))
        with report.doing("debugfs writes a new file, /letter, into flat.raw"):
            ext4.write_file(self.flat, letter, "/letter")
        with report.doing("the blocks that changed, into the overlay") as said:
            changed = 0
            with qcow2x.open(self.overlay, "r+", references="follow") as image:
                for at, block in changed_blocks(image, self.flat):
                    image.pwrite(block, at)
                    changed += 1
            said.append(f"{changed} blocks of 4 KiB")

    # ---- The way back ----

    def bring_back(self) -> None:
        report = self.report
        report.step("The overlay back to a raw disk")
        self._check(self.overlay)
        back = self.folder / "back.raw"
        with report.doing("qcow2x convert, overlay and backing file -> back.raw") as said:
            qcow2x.convert(self.overlay, back, dst_format="raw", references="follow")
            said.append(human(back.stat().st_blocks * 512))
        self._fsck(back)
        copy = self.folder / "copy"
        with report.doing("the guest's files, read by debugfs") as said:
            ext4.dump_file(back, f"/{DATABASE}", copy)
            if copy.read_bytes() != self.model:
                raise DemoFailure(f"/{DATABASE} in {back} is not what was written")
            ext4.dump_file(back, "/letter", copy)
            if copy.read_bytes() != (self.folder / "letter").read_bytes():
                raise DemoFailure(f"/letter in {back} is not what was written")
            said.append("every byte as written")
        with report.doing("qemu-img compare, the overlay as QEMU reads it") as said:
            run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", self.flat, self.overlay)
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", self.flat, back)
            said.append("identical")
        self.remove(
            self.raw, self.flat, back, copy, self.folder / "letter", self.overlay, self.base
        )

    # ---- The race ----

    def race(self) -> None:
        report = self.report
        report.step("The same writes on a raw file, on qcow2x and on QEMU (qemu-img bench)")
        caches = ["writeback"]
        if race.takes_direct(self.folder):
            caches += ["none", "directsync"]
        else:
            report.line(
                "   This file system refuses O_DIRECT: the modes none and directsync are left out."
            )
        # What the story left to be written would be written in the middle of the race.
        os.sync()
        size = max(16 * MIB, min(256 * MIB, self.options.size // 4))
        report.line(
            f"   A disk of {human(size)}, one request at a time, opening and closing not counted;\n"
            "   subjects take turns, medians of at least three rounds. Every byte compared by\n"
            "   qemu-img after each line, qemu-img check clean. More than 1 is faster."
        )
        report.race_head()
        cells = rounds.all_cells(caches)
        results = rounds.Race(self.folder, size, self.options.race_seconds).run(
            cells, report.race_row
        )
        text = race_chart(results, f"qcow2x {qcow2x.__version__}, QEMU by qemu-img bench, depth 1")
        self.options.plot.write_text(text, encoding="utf-8")
        report.line(f"\n   The same as a chart: {self.options.plot}")


def _staging(folder: Path, size: int) -> Path:
    """Where the files wait for mke2fs: in memory if there is plenty, which spares the disk."""
    memory = Path("/dev/shm")
    try:
        room = shutil.disk_usage(memory).free
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if os.access(memory, os.W_OK) and min(room, available) > 3 * size:
            return Path(tempfile.mkdtemp(prefix="qcow2x-demo-", dir=memory))
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="files-", dir=folder))


def pieces(extents: list[tuple[int, int]], at: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
    """A range of a file as (offset in the range, bytes, disk offset), by where its extents lie."""
    start = 0
    for disk_off, length in extents:
        low, high = max(at, start), min(at + nbytes, start + length)
        if low < high:
            yield low - at, high - low, disk_off + low - start
        start += length


def read_file(image: qcow2x.Image, extents: list[tuple[int, int]]) -> bytes:
    return b"".join(image.pread(length, off) for off, length in extents)


def changed_blocks(image: qcow2x.Image, disk: Path) -> Iterator[tuple[int, bytes]]:
    """The 4 KiB blocks in which the raw file *disk* differs from what the image reads as."""
    mine = bytearray(PIECE)
    with disk.open("rb") as other:
        for at in range(0, image.size, PIECE):
            n = image.preadinto(mine, at)
            theirs = other.read(PIECE)
            if theirs == mine[:n]:
                continue
            for k in range(0, n, 4096):
                block = theirs[k : k + 4096]
                if block != mine[k : k + 4096]:
                    yield at + k, block
