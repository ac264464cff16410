"""A guest at work on a recorded disk, and what each sector of it may hold after a cut of power."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable
from typing import Any

from support.stamps import noise, stamped

import qcow2x
from campaigns.power import SECTOR, Machine
from qcow2x.errors import ImageBroken


class Lost(AssertionError):
    """A byte that was acknowledged is gone, or one turned up that was never written there."""


class Version:
    """What a sector held from one point of the log on."""

    __slots__ = ("began", "data", "settled")

    def __init__(self, began: int, data: bytes) -> None:
        #: Length of the log when its write began: from there on it may be found.
        self.began = began
        #: Length of the log when it became durable: from there on nothing older may be found.
        self.settled: int | None = None
        self.data = data


class Guest:
    """Random requests to one image. ``weights`` says which and how often."""

    def __init__(
        self,
        machine: Machine,
        image: qcow2x.Image,
        rng: random.Random,
        *,
        durable_at_return: bool = False,
        window: tuple[int, int] | None = None,
    ) -> None:
        self.machine = machine
        self.image = image
        self.rng = rng
        self.durable_at_return = durable_at_return
        self.window = window
        self.sequence = 0
        #: Where the next append begins.
        self.end = 0
        content = image.pread(image.size, 0)
        self.history: list[list[Version]] = []
        for at in range(0, len(content), SECTOR):
            first = Version(0, content[at : at + SECTOR])
            first.settled = 0
            self.history.append([first])
        self._unsettled: list[Version] = []
        #: Of a guest whose work is done, once it was asked to verify.
        self._runs: list[tuple[int, bytes]] | None = None
        self._touched: list[tuple[int, list[Version]]] = []

    def work(self, steps: int, weights: dict[str, int]) -> None:
        verbs: list[Callable[[], None]] = [getattr(self, name) for name in weights]
        for verb in self.rng.choices(verbs, list(weights.values()), k=steps):
            verb()

    # ---- Requests ----

    def write(self) -> None:
        offset, length = self._range(SECTOR)
        self._write(offset, length)

    def append(self) -> None:
        """What follows the last append: a growing file in the guest."""
        length = self.rng.choice((SECTOR, 1024, 4096))
        offset = self.end
        if offset + length > self.image.size:
            offset = 0
        self._write(offset, length)
        self.end = offset + length

    def _write(self, offset: int, length: int) -> None:
        make = self.rng.choice((stamped, noise))
        data = make(offset, length, self._next())
        began = self.machine.now
        fua = self.rng.random() < 0.1
        self.image.pwrite(data, offset, fua=fua)
        self._note(began, offset, data, settled=fua)

    def write_many(self) -> None:
        """Several writes in one call, each to sectors of its own; now and then they move on."""
        requests: list[tuple[bytes, int]] = []
        moves_on = self.rng.random() < 0.4
        for _ in range(self.rng.randint(2, 6)):
            offset, length = self._range(SECTOR)
            if moves_on:
                length = min(length, self.image.size - self.end)
                offset, self.end = self.end, self.end + length
                if not length:
                    break
            if all(offset + length <= at or at + len(data) <= offset for data, at in requests):
                requests.append((stamped(offset, length, self._next()), offset))
        began = self.machine.now
        fua = self.rng.random() < 0.2
        self.image.pwritev_many(requests, fua=fua)
        for data, offset in requests:
            self._note(began, offset, data, settled=fua)

    def compress(self) -> None:
        offset, length = self._range(self.image.cluster_size)
        data = stamped(offset, length, self._next())
        began = self.machine.now
        self.image.pwrite_compressed(data, offset)
        self._note(began, offset, data)

    def discard(self) -> None:
        offset, length = self._range(self.image.cluster_size)
        began = self.machine.now
        self.image.discard(offset, length)
        # A discarded range may read as before or as zeros; it has to make up its mind now.
        self._note(began, offset, self.image.pread(length, offset))

    def zero(self) -> None:
        offset, length = self._range(SECTOR)
        began = self.machine.now
        self.image.write_zeroes(offset, length, unmap=self.rng.random() < 0.5)
        self._note(began, offset, bytes(length))

    def flush(self) -> None:
        self.image.flush()
        self.settle()

    # ---- What must be there ----

    def settle(self) -> None:
        """Everything noted so far is durable now."""
        now = self.machine.now
        for version in self._unsettled:
            version.settled = now
        self._unsettled.clear()

    def _note(self, began: int, offset: int, data: bytes, *, settled: bool = False) -> None:
        for at in range(0, len(data), SECTOR):
            version = Version(began, data[at : at + SECTOR])
            self.history[(offset + at) // SECTOR].append(version)
            if settled or self.durable_at_return:
                version.settled = self.machine.now
            else:
                self._unsettled.append(version)

    def verify(self, happened: int, content: bytes) -> None:
        """Every sector holds its last durable bytes or something written since; else Lost."""
        for start, data in self._untouched():
            if content[start : start + len(data)] != data:
                raise Lost(f"what was not written to has changed, near {start:#x}")
        for n, versions in self._touched:
            got = content[n * SECTOR : n * SECTOR + SECTOR]
            for version in reversed(versions):
                if version.began > happened:
                    continue
                if version.data == got:
                    break
                if version.settled is not None and version.settled <= happened:
                    raise Lost(
                        f"after {happened} calls sector {n} holds {got[:16].hex()}; durable there "
                        f"is {version.data[:16].hex()}"
                    )

    def _untouched(self) -> list[tuple[int, bytes]]:
        """Runs of sectors without a second version, which need no look one by one."""
        if self._runs is None:
            self._runs = []
            self._touched = [
                (n, versions) for n, versions in enumerate(self.history) if len(versions) > 1
            ]
            numbers = [-1, *(n for n, _ in self._touched), len(self.history)]
            for before, after in itertools.pairwise(numbers):
                if before + 1 < after:
                    data = b"".join(self.history[n][0].data for n in range(before + 1, after))
                    self._runs.append(((before + 1) * SECTOR, data))
        return self._runs

    def _next(self) -> int:
        self.sequence += 1
        return self.sequence

    def _range(self, align: int) -> tuple[int, int]:
        low, high = self.window or (0, self.image.size)
        offset = self.rng.randrange(low, high) // align * align
        cluster = self.image.cluster_size
        length = self.rng.choice((SECTOR, 1024, 2048, cluster, 3 * cluster))
        length = max(align, length // align * align)
        return offset, min(length, self.image.size - offset)


class UnluckyGuest(Guest):
    """One whose disk refuses a write of metadata now and then. It goes on."""

    #: Where what failed is kept in memory, or nothing on disk names its place yet.
    SITES = (
        *("refblock_update", "l2_update", "l1_update", "l2_alloc_write", "refblock_alloc_write"),
        "reftable_grow_write",
    )

    def fail(self) -> None:
        """One of the next writes will."""
        file = self.machine.files[0]
        file.failing_sites = tuple(self.rng.sample(self.SITES, self.rng.randrange(1, 4)))
        file.error = self.rng.choice((errno.EIO, errno.EIO, errno.ENOSPC))
        file.half_written = self.rng.random() < 0.5

    def _write(self, offset: int, length: int) -> None:
        data = stamped(offset, length, self._next())
        began = self.machine.now
        try:
            self.image.pwrite(data, offset)
        except ImageBroken:
            raise
        except OSError:
            # What it had written may be found until what is read now is durable.
            for at in range(0, length, SECTOR):
                version = Version(began, data[at : at + SECTOR])
                self.history[(offset + at) // SECTOR].append(version)
            self._unlucky(began, offset, length)
        else:
            self._note(began, offset, data)

    def discard(self) -> None:
        offset, length = self._range(self.image.cluster_size)
        began = self.machine.now
        try:
            self.image.discard(offset, length)
        except ImageBroken:
            raise
        except OSError:
            self._unlucky(began, offset, length)
        else:
            self._note(began, offset, self.image.pread(length, offset))

    def _unlucky(self, began: int, offset: int, length: int) -> None:
        """A request failed: nothing of it is durable, whatever the cache mode."""
        now = self.image.pread(length, offset)
        for at in range(0, length, SECTOR):
            version = Version(began, now[at : at + SECTOR])
            self.history[(offset + at) // SECTOR].append(version)
            self._unsettled.append(version)

    def flush(self) -> None:
        try:
            super().flush()
        except ImageBroken:
            raise
        except OSError:
            pass


def prepare(
    size: int, *, filled: float = 0.4, under: dict[str, Any] | None = None, **options: Any
) -> bytes:
    """The bytes of an image with ``filled`` of its disk written, a piece of it compressed. ``under``
    goes to :func:`qcow2x.open`, for its backing file."""
    machine = Machine()
    file = machine.file()
    qcow2x.create(file, size, **options)
    with qcow2x.open(file, "r+", **(under or {})) as image:
        end = int(size * filled) // SECTOR * SECTOR
        if end:
            image.pwrite(stamped(0, end, 1 << 40), 0)
            cluster = image.cluster_size
            at = size * 3 // 4 // cluster * cluster
            image.pwrite_compressed(stamped(at, cluster, 1 << 40), at)
    return bytes(file.data)
