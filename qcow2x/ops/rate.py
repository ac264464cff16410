"""A limit on bytes per second, shared by any number of threads."""

from __future__ import annotations

import threading
import time


class RateLimit:
    """:meth:`take` returns when its bytes are due, so that all of them together come to no more
    than *bytes_per_second* since the first."""

    def __init__(self, bytes_per_second: int) -> None:
        if bytes_per_second <= 0:
            raise ValueError(f"a rate of {bytes_per_second} bytes per second lets nothing through")
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._due = 0.0

    def take(self, nbytes: int) -> None:
        """Waits until *nbytes* more may go; at once after :meth:`stop`."""
        with self._lock:
            start = max(self._due, time.monotonic())
            self._due = start + nbytes / self._rate
        self._stopped.wait(max(0.0, start - time.monotonic()))

    def stop(self) -> None:
        """Whoever waits goes on: what they wait for is cancelled."""
        self._stopped.set()
