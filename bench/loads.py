"""Requests many at a time, and the disks that they go to."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

from qcow2x.demo.race import STRETCHES, Load, alternate


def many_at_once(load: Load, send: Callable[[memoryview, int], object], depth: int) -> float:
    """Seconds for all requests of *load* with *depth* of them under way, by as many threads. The same
    for a raw file and for an image, so that what the interpreter costs is the same, too."""
    requests = list(zip(load.buffers, load.offsets, strict=True))
    number = itertools.count()
    ready = threading.Barrier(depth + 1)
    failures: list[BaseException] = []

    def work() -> None:
        ready.wait()
        try:
            while (i := next(number)) < len(requests):
                send(*requests[i])
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(depth)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - start
    if failures:
        raise failures[0]
    return taken


def calls_of_many(
    load: Load, send: Callable[[list[tuple[memoryview, int]]], object], depth: int
) -> float:
    """Seconds for all requests of *load*, *depth* of them in each call."""
    requests = list(zip(load.buffers, load.offsets, strict=True))
    calls = [requests[i : i + depth] for i in range(0, len(requests), depth)]
    start = time.perf_counter()
    for call in calls:
        send(call)
    return time.perf_counter() - start


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
