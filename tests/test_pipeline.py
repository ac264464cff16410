"""The thread pool under convert and compare: order, bounds and ends."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator

import pytest

from qcow2x.ops.pipeline import Pipeline


class Stopped(Exception):
    pass


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_come_in_task_order_one_at_a_time(threads: int) -> None:
    seen: list[int] = []
    busy = threading.Lock()

    def process(task: int, slot: object) -> int:
        time.sleep(random.random() / 1000)
        return task

    def finish(result: int) -> None:
        assert busy.acquire(blocking=False)
        seen.append(result)
        busy.release()

    slots = [object() for _ in range(threads + 1)]
    Pipeline(iter(range(200)), process, finish, slots, threads).run()
    assert seen == list(range(200))


def test_no_more_tasks_in_flight_than_slots() -> None:
    taken = finished = most = 0

    def tasks() -> Iterator[int]:
        nonlocal taken, most
        for number in range(100):
            taken += 1
            most = max(most, taken - finished)
            yield number

    def finish(result: int) -> None:
        nonlocal finished
        time.sleep(0.0002)
        finished += 1

    Pipeline(tasks(), lambda task, slot: task, finish, [1, 2, 3], 6).run()
    assert finished == 100
    assert most <= 3


@pytest.mark.parametrize("where", ["tasks", "process", "finish", "tick"])
@pytest.mark.parametrize("in_order", [True, False])
def test_any_exception_ends_all_threads(where: str, in_order: bool) -> None:
    def maybe(place: str, number: int) -> int:
        if place == where and number >= 20:
            raise Stopped
        return number

    # Without an end of its own: only the exception stops it.
    tasks = (maybe("tasks", number) for number in itertools.count())
    ticks = itertools.count(20)
    before = threading.active_count()
    pipeline = Pipeline(
        tasks,
        lambda task, slot: maybe("process", task),
        lambda result: maybe("finish", result) and None,
        [1, 2, 3, 4],
        3,
        in_order=in_order,
    )
    with pytest.raises(Stopped):
        pipeline.run(lambda: maybe("tick", next(ticks)) and None)
    assert threading.active_count() == before


def test_no_tasks() -> None:
    Pipeline(iter(()), lambda t, s: t, lambda r: None, [1], 2).run()
