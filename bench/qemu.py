"""qemu-img bench as the baseline: out of huge pages as qcow2x is, and in the way that serves it best."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from qcow2x.demo import race
from qcow2x.demo.programs import DemoFailure
from qcow2x.demo.race import Load

TRIES = 2


class Qemu:
    def __init__(self, folder: Path) -> None:
        source = Path(__file__).with_name("hugepages.c")
        library = folder / "hugepages.so"
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True
        )
        self._environment = (f"LD_PRELOAD={library}",)

    def time(
        self,
        load: Load,
        path: Path,
        cache: str,
        *,
        write: bool,
        aio: str = "threads",
        depth: int = 1,
    ) -> float:
        return race.time_qemu(
            load, path, cache, write=write, aio=aio, depth=depth, environment=self._environment
        )

    def fastest_aio(self, cache: str, run: Callable[[str], float]) -> str:
        """Which of its ways to send requests serves it best, by the seconds that *run* takes with each."""
        times: dict[str, float] = {}
        for aio in race.AIO_WAYS:
            if aio == "native" and not race.RAW_FLAGS[cache] & os.O_DIRECT:
                continue
            try:
                times[aio] = min(run(aio) for _ in range(TRIES))
            except DemoFailure:
                # Not built in, or the kernel refuses it: QEMU goes without.
                continue
        return min(times, key=lambda aio: times[aio])
