"""Requests many at a time, and the disks that they go to."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, TypeVar

from qcow2x.demo.race import STRETCHES, Load

T = TypeVar("T")
One = Callable[[memoryview, int], object]


class Many(Protocol):
    def __call__(self, requests: list[tuple[memoryview, int]], *, depth: int) -> object: ...


def many_at_once(load: Load, send: One, depth: int) -> float:
    """Seconds for all requests of *load* with *depth* of them under way, by as many threads."""
    requests = list(zip(load.buffers, load.offsets, strict=True))
    return shared_out(requests, lambda request: send(*request), depth)


def one_call(load: Load, send: Many, depth: int) -> float:
    """Seconds for all requests of *load* in one call, *depth* of them under way."""
    requests = list(zip(load.buffers, load.offsets, strict=True))
    start = time.perf_counter()
    send(requests, depth=depth)
    return time.perf_counter() - start


class Team:
    """Threads that stay for the whole run: what the system keeps for a thread (a ring of requests, for
    qcow2x) need not be made for each stretch, nor in its time."""

    def __init__(self, size: int) -> None:
        self._gate = threading.Barrier(size + 1)
        self._over = threading.Event()
        self._size = size
        self._at_work = itertools.count()
        self._job: Callable[[], None] = lambda: None
        for _ in range(size):
            threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._gate.wait()
            self._job()
            if next(self._at_work) == self._size - 1:
                self._over.set()

    def seconds(self, job: Callable[[], None]) -> float:
        """How long *job*, which all of them do, takes."""
        self._job = job
        self._at_work = itertools.count()
        self._over.clear()
        self._gate.wait()
        start = time.perf_counter()
        self._over.wait()
        return time.perf_counter() - start


team_of = cache(Team)


def shared_out(work: Sequence[T], send: Callable[[T], object], threads: int) -> float:
    number = itertools.count()
    failures: list[BaseException] = []

    def go_on() -> None:
        try:
            while (i := next(number)) < len(work):
                send(work[i])
        except BaseException as exc:
            failures.append(exc)

    taken = team_of(threads).seconds(go_on)
    if failures:
        raise failures[0]
    return taken


def side_by_side(
    load: Load,
    turn: int,
    one: Callable[[Load], float],
    other: Callable[[Load], float],
    *,
    stretch: int,
) -> list[tuple[float, float]]:
    """Two subjects under the same load by turns, as many times as it has stretches of so many
    requests; who is first changes with them, and with *turn*. The seconds of both for each stretch."""
    stretches = max(1, min(STRETCHES, load.count // stretch))
    pairs = []
    for n, part in enumerate(load.parts(stretches)):
        if (n + turn) % 2:
            theirs = other(part)
            pairs.append((one(part), theirs))
        else:
            pairs.append((one(part), other(part)))
    return pairs
