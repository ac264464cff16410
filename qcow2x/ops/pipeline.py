"""A pool of threads over an ordered list of tasks, with the results used in that same order.

The heavy work of every task runs without the GIL, so plain threads are enough. The order of the
results does not depend on how many threads there are, which is what makes converted images equal
byte for byte on any machine.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from qcow2x._core.crew import share_out_again, share_out_alone

Task = TypeVar("Task")
Slot = TypeVar("Slot")

#: Seconds between two calls of the caller's ``tick``.
TICK = 0.1


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


class Pipeline(Generic[Task, Slot]):
    """Runs ``process(task, slot)`` on several threads and ``finish(result)`` in task order.

    A slot is the memory one task works in; there are never more tasks in flight than slots, which
    bounds the memory. ``finish`` runs on whichever thread holds the next result in order, never on
    two at once; with ``in_order=False`` it runs at once, on many. The first exception of any thread
    stops all of them and is raised by :meth:`run`.
    """

    def __init__(
        self,
        tasks: Iterator[Task],
        process: Callable[[Task, Slot], Any],
        finish: Callable[[Any], None],
        slots: list[Slot],
        threads: int,
        *,
        in_order: bool = True,
    ) -> None:
        self._tasks = tasks
        self._process = process
        self._finish = finish
        self._free = slots
        self._in_order = in_order
        # Lock order: _plan before _state. _state guards everything below it.
        self._plan = threading.Lock()
        self._state = threading.Condition()
        self._next_number = 0
        self._turn = 0
        self._ready: dict[int, tuple[Any, Slot]] = {}
        self._finishing = False
        self._stop = False
        self._failure: BaseException | None = None
        self._running = threads
        self._threads = [
            threading.Thread(target=self._work, name=f"qcow2x-{n}") for n in range(threads)
        ]

    def run(self, tick: Callable[[], None] | None = None) -> None:
        """Work until all is done; *tick* is called in this thread about ten times a second.

        An exception of *tick* (or a signal's) stops the threads before it is passed on.
        """
        started: list[threading.Thread] = []
        # These threads are as many as were asked for: what they read is not decoded by others besides.
        share_out_alone()
        try:
            for thread in self._threads:
                thread.start()
                started.append(thread)
            while True:
                with self._state:
                    over = self._state.wait_for(lambda: self._running == 0, TICK)
                if tick is not None:
                    tick()
                if over:
                    break
        finally:
            with self._state:
                self._stop = True
                self._state.notify_all()
            for thread in started:
                thread.join()
            share_out_again()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while self._one_task():
                pass
        except BaseException as exc:
            with self._state:
                if self._failure is None:
                    self._failure = exc
                self._stop = True
        finally:
            with self._state:
                self._running -= 1
                self._state.notify_all()

    def _one_task(self) -> bool:
        # The slot comes first: whoever has the lowest number then always has memory to go on with.
        with self._state:
            self._state.wait_for(lambda: self._free or self._stop)
            if self._stop:
                return False
            slot = self._free.pop()
        with self._plan:
            task = next(self._tasks, None)
            number = self._next_number
            self._next_number += 1
        if task is None:
            self._give_back(slot)
            return False
        result = self._process(task, slot)
        if self._in_order:
            with self._state:
                self._ready[number] = (result, slot)
            self._finish_ready()
        else:
            self._finish(result)
            self._give_back(slot)
        return True

    def _finish_ready(self) -> None:
        with self._state:
            if self._finishing:
                # Whoever is at it looks again, under this lock, before it leaves.
                return
            self._finishing = True
        while True:
            with self._state:
                item = None if self._stop else self._ready.pop(self._turn, None)
                if item is None:
                    self._finishing = False
                    return
            self._finish(item[0])
            with self._state:
                self._turn += 1
            self._give_back(item[1])

    def _give_back(self, slot: Slot) -> None:
        with self._state:
            self._free.append(slot)
            self._state.notify_all()
