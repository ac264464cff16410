"""Uses an image in every way, and says what was wrong with how that went."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import qcow2x
from campaigns.fuzz.seeds import KEY
from qcow2x.errors import CorruptImage, FormatError, Qcow2Error, UnsupportedFeature

MIB = 1 << 20
#: Where a message has to say which file it speaks of.
_NAMES_THE_FILE = (CorruptImage, FormatError, UnsupportedFeature)
#: What qemu-img finds nothing wrong with and we refuse, on purpose: see docs/reliability.md.
REFUSED_ON_PURPOSE: tuple[str, ...] = ()


class Wrong(Exception):
    """An image was used, and what happened must not."""


class Use:
    """One image file under test. ``wrong`` has the findings."""

    def __init__(self, path: Path, ask_qemu: bool) -> None:
        self.path = path
        self.ask_qemu = ask_qemu
        self.asked = False
        self.wrong: list[str] = []
        self.refused = ""
        self.clean = False
        self.encrypted = path.read_bytes()[32:36] not in (bytes(4), b"")

    def all(self) -> None:
        self._step("inspect", lambda: qcow2x.inspect(self.path))
        before = self._look()
        if self.ask_qemu:
            self._qemu()
        copy = self.path.read_bytes()
        self._write()
        self.path.write_bytes(copy)
        self._repair(before)

    def _step(self, name: str, step: Callable[[], Any]) -> Any:
        """The value; None if it raised what it may."""
        try:
            return step()
        except _NAMES_THE_FILE as exc:
            self.refused = str(exc)
            if self.path.name not in str(exc):
                self.wrong.append(f"{name}: does not say which file: {exc!r}")
        except MemoryError:
            self.wrong.append(f"{name}: asked for too much memory")
        except (Qcow2Error, ValueError, OSError) as exc:
            self.refused = str(exc)
        except Wrong as exc:
            self.wrong.append(f"{name}: {exc}")
        except Exception as exc:
            self.wrong.append(f"{name}: {type(exc).__name__}: {exc}")
        return None

    # ---- Reading ----

    def _places(self, size: int) -> list[tuple[int, int]]:
        places = [(0, 128 << 10), (max(0, size - 5000), 5000)]
        if size > 128 << 10:
            places.append((random.Random(size).randrange(size), 4096))
        return places

    def _read(self, image: qcow2x.Image) -> list[bytes | None]:
        """What the guest sees; None where it would be told of an error."""
        return [
            self._step("read", lambda at=at, n=n: image.pread(n, at))
            for at, n in self._places(image.size)
        ]

    def _open(self, mode: str, **more: Any) -> Any:
        return self._step(
            f"open {mode}",
            lambda: qcow2x.open(self.path, mode, key=KEY, lock=False, cache="unsafe", **more),
        )

    def _look(self) -> list[bytes | None] | None:
        self.refused = ""
        image = self._open("r")
        if image is None:
            return None
        self.refused = ""
        seen = self._read(image)
        self._step("info", image.info)
        self._step("extents", lambda: list(islice(image.extents(), 2000)))
        found = self._step("check", image.check)
        self.clean = found is not None and found.clean and not self.refused
        for made in islice(self._step("snapshots", lambda: list(image.snapshots)) or (), 3):
            self._step("snapshot", lambda key=made.id: self._read_snapshot(image, key))
        for name in islice(self._step("bitmaps", lambda: list(image.bitmaps)) or (), 3):
            self._step("bitmap", lambda name=name: list(islice(image.bitmaps.extents(name), 2000)))
        self._step("close", image.close)
        return seen

    def _read_snapshot(self, image: qcow2x.Image, key: str) -> None:
        with image.snapshots.open(key) as then:
            self._read(then)

    # ---- Writing ----

    def _write(self) -> None:
        image = self._open("r+")
        if image is None:
            return
        size, cluster = image.size, image.cluster_size
        rng = random.Random(f"{size} {cluster}")
        near = min(size, MIB)

        def somewhere() -> tuple[int, int]:
            at = rng.randrange(max(near, 1))
            return at, rng.randint(0, min(3 * cluster, 64 << 10, near - at))

        def write() -> None:
            at, n = somewhere()
            data = rng.randbytes(n)
            image.pwrite(data, at)
            with suppress(Qcow2Error, OSError):
                if image.pread(n, at) != data:
                    raise Wrong(f"{n} bytes written at {at} read differently")

        whole = min(cluster, size)
        snapshots = image.snapshots
        steps: list[tuple[str, Callable[[], Any]]] = [
            ("write", write),
            ("write last", lambda: image.pwrite(b"z", size - 1)),
            ("compress", lambda: image.pwrite_compressed(bytes(whole), 0)),
            ("zero", lambda: image.write_zeroes(*somewhere(), unmap=True)),
            ("discard", lambda: image.discard(*somewhere())),
            ("flush", image.flush),
            ("write", write),
            ("snapshot", lambda: snapshots.create("fresh")),
            ("write", write),
            ("apply", lambda: snapshots and snapshots.apply(snapshots[0].id)),
            ("delete", lambda: snapshots and snapshots.delete(snapshots[-1].id)),
            ("bitmap", lambda: image.bitmaps.add("fresh", 4096)),
            ("write", write),
            ("unmark", lambda: "fresh" in image.bitmaps and image.bitmaps.remove("fresh")),
            ("grow", lambda: image.resize(size + MIB & ~511)),
            ("write", write),
            ("flush", image.flush),
        ]
        for name, step in steps:
            self._step(name, step)
        self._step("close r+", image.close)
        if self.clean and not self.wrong:
            self._step("check what was written", self._still_sound)

    def _still_sound(self) -> None:
        found = qcow2x.check(self.path, lock=False)
        if found.corruptions or found.check_errors:
            raise Wrong(f"was clean and no longer is: {list(found.findings)[:3]}")

    def _repair(self, before: list[bytes | None] | None) -> None:
        found = self._step("repair", lambda: qcow2x.check(self.path, repair="all", lock=False))
        if found is None or before is None:
            return
        after = self._step("read after a repair", self._look_again)
        if after is None:
            # What was refused from then on would be a loss; unless it is for the passphrase.
            self.wrong.append(f"repair: the image no longer opens: {self.refused}")
            return
        if self.encrypted and any(finding.code == "beyond-end" for finding in found.findings):
            # What is not there is zeros as it lies in the file, and anything once deciphered; of
            # an entry that says zeros it is zeros.
            return
        for was, now in zip(before, after, strict=True):
            if was is not None and was != now:
                self.wrong.append(f"repair ({found.corruptions} left) changed what is read")
                return
        if not found.clean:
            return
        again = self._step("check after a repair", lambda: qcow2x.check(self.path, lock=False))
        if again is not None and not again.clean:
            self.wrong.append(f"repair: called clean, and is not: {list(again.findings)[:3]}")

    def _look_again(self) -> list[bytes | None]:
        with qcow2x.open(self.path, key=KEY, lock=False) as image:
            return self._read(image)

    # ---- QEMU ----

    def _qemu(self) -> None:
        opts = f"driver=qcow2,file.filename={self.path}"
        if self.encrypted:
            opts += ",encrypt.key-secret=key"
        command = ["qemu-img", "check", "-U", "--object", f"secret,id=key,data={KEY}"]
        try:
            done = subprocess.run([*command, "--image-opts", opts], capture_output=True, timeout=60)
        except subprocess.TimeoutExpired:
            return
        self.asked = True
        said = (done.stdout + done.stderr).decode(errors="replace").strip()[-300:]
        if done.returncode == 0 and self.refused and not self.clean:
            if not any(reason in self.refused for reason in REFUSED_ON_PURPOSE):
                self.wrong.append(f"qemu-img calls it clean, we refuse: {self.refused}")
        if self.clean and done.returncode == 2:
            self.wrong.append(f"we call it clean, qemu-img check does not: {said}")


def high_water(reset: bool = False) -> int:
    """Bytes of memory that the process had at most, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0
