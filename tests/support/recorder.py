"""A Python storage that remembers every call, can fail any of them, and can show the file as a cut of
power would have left it."""

import errno
import random
from collections.abc import Iterator

SECTOR = 512


class Recorder:
    """Bytes in memory with the surface of a storage; not thread-safe."""

    def __init__(self, data: bytes | bytearray = b"") -> None:
        self.start = bytes(data)
        self.data = bytearray(data)
        #: ("write", offset, bytes), ("punch", offset, length), ("truncate", size) or ("flush",)
        self.log: list[tuple] = []
        self.calls = 0
        #: Fails the calls with these numbers (writes and flushes count) with this errno.
        self.failing: range | None = None
        self.error = errno.EIO

    def size(self) -> int:
        return len(self.data)

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def pwrite(self, buffer: bytes, offset: int) -> int:
        self._may_fail()
        data = bytes(buffer)
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
        self.log.append(("flush",))

    def _may_fail(self) -> None:
        self.calls += 1
        if self.failing is not None and self.calls in self.failing:
            raise OSError(self.error, "this storage was told to fail")

    def _do(self, *entry: object) -> None:
        self.log.append(entry)
        apply(self.data, entry)

    def crashes(self, rng: random.Random, per_point: int) -> Iterator[tuple[int, bytes]]:
        """For every point of the log, files that a cut of power there may leave: all that was
        written before the last flush, and any part of what came after it. Yields how much of the
        log had happened, and the file."""
        durable = bytearray(self.start)
        pending: list[tuple] = []
        for at, entry in enumerate(self.log, 1):
            if entry[0] == "flush":
                for happened in pending:
                    apply(durable, happened)
                pending = []
                continue
            pending.append(entry)
            for _ in range(per_point):
                state = bytearray(durable)
                keep = rng.choice([0.0, 0.1, 0.5, 0.9])
                for happened in pending[:-1]:
                    if rng.random() < keep:
                        apply(state, _torn(happened, rng))
                if rng.random() < 0.8:
                    apply(state, _torn(pending[-1], rng))
                yield at, bytes(state)


def _torn(entry: tuple, rng: random.Random) -> tuple:
    """Now and then only some sectors at the front of a write get there."""
    if entry[0] == "write" and len(entry[2]) > SECTOR and rng.random() < 0.3:
        sectors = rng.randrange(1, -(-len(entry[2]) // SECTOR))
        return (entry[0], entry[1], entry[2][: sectors * SECTOR])
    return entry


def apply(data: bytearray, entry: tuple) -> None:
    kind = entry[0]
    if kind == "write":
        _, offset, fresh = entry
        if len(data) < offset:
            data.extend(bytes(offset - len(data)))
        data[offset : offset + len(fresh)] = fresh
    elif kind == "punch":
        _, offset, length = entry
        length = max(0, min(length, len(data) - offset))
        data[offset : offset + length] = bytes(length)
    else:
        assert kind == "truncate"
        size = entry[1]
        del data[size:]
        data.extend(bytes(size - len(data)))
