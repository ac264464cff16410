"""Requests many at a time, and the disks that they go to."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from qcow2x.demo.race import STRETCHES, Load, alternate

T = TypeVar("T")


def many_at_once(load: Load, send: Callable[[memoryview, int], object], depth: int) -> float:
    """Seconds for all requests of *load* with *depth* of them under way, by as many threads. The same
    for a raw file and for an image, so that what the interpreter costs is the same, too."""
    requests = list(zip(load.buffers, load.offsets, strict=True))
    return by_threads(requests, lambda request: send(*request), depth)


def calls_of_many(
    load: Load,
    send: Callable[[list[tuple[memoryview, int]]], object],
    depth: int,
    *,
    callers: int = 1,
) -> float:
    """Seconds for all requests of *load*, *depth* of them under way in the calls of *callers* threads:
    where one call ends, those of the others keep the disk busy."""
    requests = list(zip(load.buffers, load.offsets, strict=True))
    each = depth // callers
    calls = [requests[i : i + each] for i in range(0, len(requests), each)]
    return by_threads(calls, send, callers)


def by_threads(work: Sequence[T], send: Callable[[T], object], threads: int) -> float:
    number = itertools.count()
    ready = threading.Barrier(threads + 1)
    failures: list[BaseException] = []

    def go_on() -> None:
        ready.wait()
        try:
            while (i := next(number)) < len(work):
                send(work[i])
        except BaseException as exc:
            failures.append(exc)

    team = [threading.Thread(target=go_on) for _ in range(threads)]
    for thread in team:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in team:
        thread.join()
    taken = time.perf_counter() - start
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
) -> tuple[float, float]:
    """Two subjects under the same load by turns, as many times as it has stretches of so many
    requests; who is first changes with them, and with *turn*."""
    stretches = max(1, min(STRETCHES, load.count // stretch))
    if turn % 2:
        second, first = alternate(load, other, one, stretches=stretches)
    else:
        first, second = alternate(load, one, other, stretches=stretches)
    return first, second
