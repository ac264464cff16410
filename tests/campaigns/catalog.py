"""Every kind of work that the crash campaign interrupts, by its name."""

from __future__ import annotations

import random
from collections.abc import Callable

from campaigns import repairs, workloads

WORKLOADS: dict[str, Callable[[random.Random], workloads.Case]] = {
    **workloads.WORKLOADS,
    "repair": repairs.repair,
    "repair undone": repairs.repair_undone,
}
