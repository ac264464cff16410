"""One image and everybody at once: what campaigns/race.py has ThreadSanitizer watch.

Writers, readers, snapshots, bitmaps, resizes, checks, flushes and a close share one Image, of a
shape that the seed of the round gives. All that is written says where it belongs (support/stamps.py).
Each writer has sectors and clusters of its own, so what it reads of these is exact; unless the round
*travels*: then snapshots are applied and the end of the disk moves, and bytes need only belong where
they are.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.stamps import SECTOR, explain, stamped

import qcow2x

KiB = 1 << 10
WRITERS = 4
#: Requests of a writer between two looks at whether the round is over.
AT_ONCE = 40
KEY = "crowd"
NAMES = ("marks", "more")


@dataclass(frozen=True)
class Shape:
    """What one round is about."""

    cluster: int = 4096
    extended: bool = False
    cache: str = "writeback"
    growth: str = "auto"
    lazy: bool = False
    compression: str = "zlib"
    layers_below: int = 0
    encrypted: bool = False
    #: The disk's data lies in a file of its own, so that there are no snapshots.
    data_file: bool = False
    #: The image lies in an object of Python's.
    python: bool = False
    #: Snapshots are applied, and the end of the disk moves.
    travels: bool = False
    #: Bitmaps come and go. They keep the disk from shrinking.
    bitmaps: bool = True
    #: The image is closed while everybody works.
    closes: bool = False

    @staticmethod
    def of(seed: int) -> Shape:
        rng = random.Random(f"crowd {seed}")
        cluster = rng.choice((512, 4096, 4096, 16384, 65536))
        special = rng.choice(("", "", "", "", "encrypted", "data file", "python"))
        return Shape(
            cluster=cluster,
            extended=cluster >= 16384 and rng.random() < 0.5,
            # What is Python's has no way past the page cache.
            cache=("unsafe", "writeback", "writethrough", "none", "directsync")[
                seed % (3 if special == "python" else 5)
            ],
            growth=rng.choice(("auto", "ahead", "together", "plain")),
            lazy=rng.random() < 0.4,
            compression=rng.choice(("zlib", "zstd")),
            # An object has no folder that a backing file's name could count from.
            layers_below=rng.choice((0, 0, 1, 3)) if special != "python" else 0,
            encrypted=special == "encrypted",
            data_file=special == "data file",
            python=special == "python",
            travels=seed % 3 == 1,
            bitmaps=seed % 3 != 1 or rng.random() < 0.3,
            closes=seed % 2 == 1,
        )


class InPython:
    """A file as an object that the core calls, under the interpreter's lock."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "r+b", buffering=0)

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def pread(self, length: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)

    def pwrite(self, data: Any, offset: int) -> int:
        return os.pwrite(self._file.fileno(), data, offset)

    def truncate(self, size: int) -> None:
        os.truncate(self._file.fileno(), size)

    def flush(self) -> None:
        os.fdatasync(self._file.fileno())


class Round:
    """One image, from its creation to its close, and its threads."""

    def __init__(
        self, folder: Path, shape: Shape, seed: int, counts: Counter[str], seconds: float = 2
    ) -> None:
        self.shape = shape
        self.seed = seed
        self.counts = counts
        self.seconds = seconds
        self.failures: list[BaseException] = []
        self.stop = threading.Event()
        self.path = folder / "disk.qcow2"
        #: Each cluster of the first half is shared by all writers, sector by sector; of the second
        #: each is one writer's.
        self.half = max(256 * KiB, 4 * WRITERS * shape.cluster)
        self.disk = 2 * self.half
        self.models = [bytearray(self.disk) for _ in range(WRITERS)]
        self.image = self._create(folder)

    def _create(self, folder: Path) -> Any:
        shape = self.shape
        below: dict[str, Any] = {}
        for n in range(shape.layers_below):
            path = folder / f"below{n}.qcow2"
            qcow2x.create(path, self.disk, compression_type=("zlib", "zstd")[n % 2], **below)
            with qcow2x.open(path, "r+", references="follow") as image:
                at = n * self.disk // 4
                data = stamped(at, self.disk // 2, n + 1)
                image.pwrite(data, at)
                image.pwrite_compressed(data[: 64 * KiB], at)
                for model in self.models:
                    model[at : at + len(data)] = data
            below = {"backing_file": path.name, "backing_format": "qcow2"}
        key = qcow2x.Encryption(KEY, iter_time_ms=1) if shape.encrypted else None
        if shape.data_file:
            below["data_file"] = self.path.with_name("data")
            below["data_file_raw"] = not shape.layers_below and self.seed % 4 == 0
        qcow2x.create(
            self.path, self.disk, cluster_size=shape.cluster, extended_l2=shape.extended,
            lazy_refcounts=shape.lazy, compression_type=shape.compression, encryption=key, **below,
        )  # fmt: skip
        image = qcow2x.open(
            InPython(self.path) if shape.python else self.path, "r+", references="follow", cache=shape.cache, growth=shape.growth,
            l2_cache_size=1, key=KEY if shape.encrypted else None,
        )  # fmt: skip
        if shape.bitmaps:
            image.bitmaps.add(NAMES[0], 4096)
        return image

    # ---- The round ----

    def run(self) -> None:
        """Raises what went wrong first."""
        jobs: list[Callable[[], None]] = [lambda n=n: self.write(n) for n in range(WRITERS)]
        jobs += [self.read, self.read_many, self.change, self.look]
        if self.shape.travels:
            jobs += [self.move_end]
        threads = [threading.Thread(target=self._guarded, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        with ExitStack() as end:
            end.callback(self._end, threads)
            time.sleep(self.seconds / 2)
            self._fork()
            time.sleep(self.seconds / 2)
        if self.failures:
            raise self.failures[0]
        self._verify()

    def _end(self, threads: list[threading.Thread]) -> None:
        if self.shape.closes:
            # Whoever is under way is told so, or ends before.
            self.image.close()
        self.stop.set()
        for thread in threads:
            thread.join()
        self.image.close()

    def _guarded(self, job: Callable[[], None]) -> None:
        while not self.stop.is_set():
            try:
                job()
            except qcow2x.UnsupportedFeature:
                # Bitmaps while the disk becomes shorter: refused, nothing changed.
                continue
            except ValueError as exc:
                if not self.image.closed or "closed" not in str(exc):
                    self.failures.append(exc)
                return
            except BaseException as exc:
                self.failures.append(exc)
                return

    def _count(self, what: str) -> None:
        self.counts[what] += 1

    # ---- Writers ----

    def write(self, number: int) -> None:
        rng = random.Random()
        actions = [self._write_sector, self._write_sector, self._write_own]
        if self.shape.travels:
            actions.append(self._write_at_the_end)
        for _ in range(AT_ONCE):
            rng.choice(actions)(number, rng)

    def _write_sector(self, number: int, rng: random.Random) -> None:
        """Sectors number, number + WRITERS ... of the first half."""
        at = (rng.randrange(self.half // SECTOR // WRITERS) * WRITERS + number) * SECTOR
        kind = rng.random()
        if kind < 0.6:
            data = stamped(at, SECTOR, rng.getrandbits(60))
            self.image.pwrite(data, at, fua=kind < 0.05)
            self._count("writes")
        elif kind < 0.8:
            data = bytes(SECTOR)
            self.image.write_zeroes(at, SECTOR, unmap=kind < 0.7)
            self._count("zeros")
        else:
            self._expect(number, at, SECTOR)
            return
        self.models[number][at : at + SECTOR] = data

    def _write_own(self, number: int, rng: random.Random) -> None:
        """Clusters number, number + WRITERS ... of the second half, up to two in one request."""
        cluster = self.shape.cluster
        mine = range(self.half + number * cluster, self.disk, WRITERS * cluster)
        at, length = rng.choice(mine), cluster
        kind = rng.randrange(8)
        data = stamped(at, length, rng.getrandbits(60))
        if kind == 7:
            cuts = sorted({0, length, *(rng.randrange(length) for _ in range(5))})
            self.image.pwritev_many(
                [(data[low:high], at + low) for low, high in itertools.pairwise(cuts)]
            )
            self._count("writes of many")
        elif kind == 0:
            skip = rng.randrange(length)
            at, data = at + skip, data[skip : skip + rng.randint(1, length - skip)]
            self.image.pwrite(data, at)
            self._count("writes")
        elif kind == 1:
            self.image.pwrite(data, at)
            self._count("writes")
        elif kind == 2 and not (self.shape.encrypted or self.shape.data_file):
            self.image.pwrite_compressed(data, at)
            self._count("compressed writes")
        elif kind == 3:
            data = bytes(length)
            self.image.discard(at, length)
            self._count("discards")
        elif kind == 4:
            data = bytes(length)
            self.image.write_zeroes(at, length, unmap=rng.random() < 0.5)
            self._count("zeros")
        else:
            self._expect(number, at, length)
            return
        self.models[number][at : at + len(data)] = data

    def _write_at_the_end(self, number: int, rng: random.Random) -> None:
        """Near the end of the disk, wherever that is by then."""
        at = max(0, self.image.size - rng.randrange(1, 128) * SECTOR)
        length = rng.randint(1, 16) * SECTOR
        with suppress(ValueError):
            kind = rng.randrange(4)
            if kind == 0:
                self.image.discard(at, length)
            elif kind == 1:
                self.image.write_zeroes(at, length, unmap=True)
            else:
                self.image.pwrite(stamped(at, length, rng.getrandbits(60)), at)
            self._count("requests at the end")

    def _expect(self, number: int, at: int, length: int) -> None:
        got = self.image.pread(length, at)
        wanted = self.models[number][at : at + length]
        if self.shape.travels:
            self._belongs(at, got)
        elif got != wanted:
            raise AssertionError(explain(at, got, wanted))
        self._count("reads of one's own")

    def _belongs(self, at: int, data: bytes) -> None:
        """Nothing that was written elsewhere. A sector may be half old and half new."""
        for skip in range(-at % SECTOR, len(data), SECTOR):
            place = (at + skip).to_bytes(8, "big")
            for got, wanted in zip(data[skip : skip + 8], place, strict=False):
                if got not in (0, wanted):
                    raise AssertionError(f"foreign bytes at {at + skip:#x}: {data[skip:][:16]!r}")

    # ---- Readers ----

    def read(self) -> None:
        size = self.image.size
        at = random.randrange(max(1, size - 64 * KiB))
        self._belongs(at, self.image.pread(64 * KiB, at))
        with suppress(ValueError if self.shape.travels else ()):
            list(self.image.extents(at, min(64 * KiB, size - at)))
        self._count("reads")

    def read_many(self) -> None:
        wanted = [
            (bytearray(random.choice((512, 4096, 5000))), random.randrange(self.half))
            for _ in range(random.randint(2, 30))
        ]
        self.image.preadv_many(wanted)
        for data, at in wanted:
            self._belongs(at, bytes(data))
        self._count("reads of many")

    # ---- Whoever changes more than bytes ----

    def change(self) -> None:
        if not self.shape.data_file:
            self._snapshots()
        if self.shape.bitmaps:
            self._bitmaps()
        if random.random() < 0.3 and not self.shape.data_file:
            at = random.randrange(64 * KiB)
            self.image.vmstate_pwrite(b"state" * random.randrange(1, 2000), at)
            self.image.vmstate_pread(9000, 0)
            self._count("machine states")

    def _snapshots(self) -> None:
        snapshots = self.image.snapshots
        made = snapshots.create("now")
        with snapshots.open(made.id) as then:
            self._belongs(0, then.pread(64 * KiB, 0))
            list(then.extents(0, min(then.size, 256 * KiB)))
        self._count("snapshots")
        try:
            if self.shape.travels:
                snapshots.apply(made.id)
                self._count("snapshots applied")
        finally:
            snapshots.delete(made.id)

    def _bitmaps(self) -> None:
        bitmaps = self.image.bitmaps
        first, other = NAMES
        if other in bitmaps:
            # The disk may become longer in the middle of it, and its bitmaps with it.
            with suppress(KeyError if self.shape.travels else ()):
                bitmaps.merge(first, [other])
            bitmaps.remove(other)
        else:
            bitmaps.add(other, random.choice((512, 65536)), enabled=random.random() < 0.7)
        random.choice((bitmaps.enable, bitmaps.disable, bitmaps.clear))(first)
        list(bitmaps.extents(first))
        bitmaps.to_bytes(first)
        self._count("bitmap changes")

    def move_end(self) -> None:
        step = random.randrange(1, 64) * 4 * KiB
        size = self.image.size
        if size >= self.disk + 512 * KiB:
            self.image.resize(self.disk + step, shrink=True)
        else:
            # By now it may be longer than that: a snapshot was applied.
            self.image.resize(size + step, shrink=True)
        self._count("resizes")

    def look(self) -> None:
        self.image.flush()
        self.image.stats()
        self.image.info()
        list(self.image.snapshots)
        for name in self.image.bitmaps:
            with suppress(KeyError):
                list(self.image.bitmaps.extents(name))
                self.image.bitmaps[name]
        self._count("flushes")
        if random.random() < 0.2:
            # What it finds while others write is not said; that it harms nobody is.
            self.image.check()
            self._count("checks")

    def _fork(self) -> None:
        """A child opens the image for itself; the parent's is not to be used there."""
        child = os.fork()
        if child == 0:
            status = 1
            with suppress(BaseException):
                options: dict[str, Any] = {"references": "follow", "lock": False}
                if self.shape.encrypted:
                    options["key"] = KEY
                with qcow2x.open(self.path, **options) as image:
                    status = 0 if image.size >= self.disk else 2
            os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            raise AssertionError(f"the child ended with {status}")
        self._count("forks")

    # ---- The end ----

    def _verify(self) -> None:
        key = KEY if self.shape.encrypted else None
        found = qcow2x.check(self.path)
        if not found.clean:
            raise AssertionError(f"not clean: {list(found.findings)[:3]}")
        with qcow2x.open(self.path, references="follow", key=key) as image:
            disk = image.pread(image.size, 0)
        self._belongs(0, disk)
        if self.shape.closes or self.shape.travels:
            return
        for number, model in enumerate(self.models):
            for at in range(number * SECTOR, self.half, WRITERS * SECTOR):
                self._compare(disk, model, at, SECTOR)
            cluster = self.shape.cluster
            for at in range(self.half + number * cluster, self.disk, WRITERS * cluster):
                self._compare(disk, model, at, cluster)

    def _compare(self, disk: bytes, model: bytearray, at: int, length: int) -> None:
        if disk[at : at + length] != model[at : at + length]:
            raise AssertionError(explain(at, disk[at : at + length], model[at : at + length]))
