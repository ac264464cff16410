"""Files that lose power together, and everything that a cut may leave of them.

The model is that of a disk with a volatile write cache: what a flush has acknowledged is there; of
what came after it any part may be, in any order, whole or only some sectors of it. A sector of 512
bytes is old or new, never a mixture.
"""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

SECTOR = 512

#: Between two flushes all subsets of up to this many calls are tried (256 states), of more a sample.
EXHAUSTIVE_CALLS = 8

#: ("write", offset, bytes), ("punch", offset, length), ("truncate", size) or ("flush",)
Call = tuple


class State(NamedTuple):
    """What one cut of power left."""

    #: So many calls of the log may have left a trace; the acknowledged ones among them have.
    happened: int
    files: list[bytes]


#: Nesting of :func:`unsynced`.
_unsynced: list[None] = []


@contextmanager
def unsynced() -> Iterator[None]:
    """Flushes are told to have worked and do nothing: for the mutation check."""
    _unsynced.append(None)
    try:
        yield
    finally:
        _unsynced.pop()


class Machine:
    """A set of recorded files and the log of all calls on them."""

    def __init__(self) -> None:
        self.files: list[RecordedFile] = []
        #: (index of the file, the call)
        self.log: list[tuple[int, Call]] = []

    def file(self, data: bytes = b"") -> RecordedFile:
        if self.log:
            raise ValueError("a file that joins late was not there at an earlier cut")
        self.files.append(RecordedFile(self, len(self.files), data))
        return self.files[-1]

    @property
    def now(self) -> int:
        return len(self.log)

    def states(self, rng: random.Random, samples: int) -> Iterator[State]:
        """The states of one walk along the log: every prefix; before every flush every subset of
        the calls that it covers, if they are few, and torn writes; ``samples`` random ones."""
        durable = [bytearray(file.start) for file in self.files]
        pending: list[tuple[int, int, Call]] = []
        settled = 0
        yield State(0, _copies(durable))
        for at, (which, call) in enumerate(self.log, 1):
            if call[0] != "flush":
                pending.append((at, which, call))
                yield _state(durable, pending, settled)
                continue
            yield from _before_a_flush(durable, pending, settled, rng, samples)
            for _, owner, happened in pending:
                if owner == which:
                    apply(durable[owner], happened)
            pending = [entry for entry in pending if entry[1] != which]
            settled = at
        yield from _before_a_flush(durable, pending, settled, rng, samples)


class RecordedFile:
    """One file in memory with the surface of a storage object; not thread-safe."""

    def __init__(self, machine: Machine, index: int, data: bytes) -> None:
        self._machine = machine
        #: As a regular file: what lies behind the end reads as zeros once the file reaches there.
        self.zero_past_end = True
        self._index = index
        self.start = bytes(data)
        self.data = bytearray(data)
        #: The calls of these numbers, counted from 1, fail with ``error``; a failing write may leave
        #: its front half.
        self.failing: range | None = None
        #: Not of a disk that is full: what is there can be read.
        self.reads_fail = True
        self.error = errno.EIO
        self.half_written = False
        #: The next write at one of these sites fails, and then no more.
        self.failing_sites: tuple[str, ...] = ()
        self.calls = 0
        #: Where the image is, and where it was when first a call failed: names of status.h.
        self.site = self.failed_at = "NONE"

    def at_site(self, name: str) -> None:
        self.site = name

    def size(self) -> int:
        return len(self.data)

    def pread(self, length: int, offset: int) -> bytes:
        if self._fails() and self.reads_fail:
            raise self._failure()
        return bytes(self.data[offset : offset + length])

    def pwrite(self, buffer: bytes, offset: int) -> int:
        data = bytes(buffer)
        if self._fails() or self._is_trapped():
            if self.half_written:
                self._do("write", offset, data[: len(data) // 2 // SECTOR * SECTOR])
            raise self._failure()
        self._do("write", offset, data)
        return len(data)

    def punch(self, offset: int, length: int) -> None:
        self._may_fail()
        self._do("punch", offset, length)

    def truncate(self, size: int) -> None:
        self._may_fail()
        self._do("truncate", size)

    def flush(self) -> None:
        self._may_fail()
        if not _unsynced:
            self._machine.log.append((self._index, ("flush",)))

    def _fails(self) -> bool:
        self.calls += 1
        if self.failing is None or self.calls not in self.failing:
            return False
        if self.failed_at == "NONE":
            self.failed_at = self.site
        return True

    def _is_trapped(self) -> bool:
        if self.site not in self.failing_sites:
            return False
        self.failing_sites = ()
        return True

    def _may_fail(self) -> None:
        if self._fails():
            raise self._failure()

    def _failure(self) -> OSError:
        return OSError(self.error, "this storage was told to fail")

    def _do(self, *call: object) -> None:
        self._machine.log.append((self._index, call))
        apply(self.data, call)


def apply(data: bytearray, call: Call) -> None:
    """Does what a recorded call did, to ``data``."""
    kind = call[0]
    if kind == "write":
        _, offset, fresh = call
        if len(data) < offset:
            data.extend(bytes(offset - len(data)))
        data[offset : offset + len(fresh)] = fresh
    elif kind == "punch":
        _, offset, length = call
        length = max(0, min(length, len(data) - offset))
        data[offset : offset + length] = bytes(length)
    else:
        assert kind == "truncate"
        size = call[1]
        del data[size:]
        data.extend(bytes(size - len(data)))


def _before_a_flush(
    durable: list[bytearray],
    pending: list[tuple[int, int, Call]],
    settled: int,
    rng: random.Random,
    samples: int,
) -> Iterator[State]:
    if not pending:
        return
    if len(pending) <= EXHAUSTIVE_CALLS:
        for size in range(len(pending)):
            for chosen in itertools.combinations(pending, size):
                yield _state(durable, list(chosen), settled)
    else:
        for missing in range(len(pending)):
            yield _state(durable, pending[:missing] + pending[missing + 1 :], settled)
            yield _state(durable, [pending[missing]], settled)
    for n, (at, which, call) in enumerate(pending):
        if call[0] == "write" and len(call[2]) > SECTOR:
            for torn in (_front(call, rng), _scattered(call, rng)):
                before = rng.choice((pending[:n], []))
                yield _state(durable, [*before, *((at, which, part) for part in torn)], settled)
    for _ in range(samples):
        keep = rng.choice((0.1, 0.5, 0.9))
        chosen = [entry for entry in pending if rng.random() < keep]
        # The order shows only where calls overlap, on a disk that reorders them.
        if rng.random() < 0.5:
            rng.shuffle(chosen)
        parts = []
        for at, which, call in chosen:
            torn = [call]
            if call[0] == "write" and len(call[2]) > SECTOR and rng.random() < 0.3:
                torn = _scattered(call, rng)
            parts += [(at, which, part) for part in torn]
        yield _state(durable, parts, settled)


def _state(durable: list[bytearray], calls: list[tuple[int, int, Call]], settled: int) -> State:
    files = _copies(durable)
    mutable: dict[int, bytearray] = {}
    for _, which, call in calls:
        if which not in mutable:
            mutable[which] = bytearray(files[which])
        apply(mutable[which], call)
    for which, data in mutable.items():
        files[which] = bytes(data)
    return State(max([settled, *(at for at, _, _ in calls)]), files)


def _copies(durable: list[bytearray]) -> list[bytes]:
    return [bytes(data) for data in durable]


def _front(call: Call, rng: random.Random) -> list[Call]:
    """Only so many sectors at the front of a write."""
    sectors = rng.randrange(1, -(-len(call[2]) // SECTOR))
    return [("write", call[1], call[2][: sectors * SECTOR])]


def _scattered(call: Call, rng: random.Random) -> list[Call]:
    """Any sectors of a write but not all."""
    parts = [
        ("write", call[1] + at, call[2][at : at + SECTOR]) for at in range(0, len(call[2]), SECTOR)
    ]
    return rng.sample(parts, rng.randrange(1, len(parts)))
