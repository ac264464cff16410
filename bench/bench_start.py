"""How long a tool takes from its start to its answer, beside qemu-img."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time

from interpreter import environment

import qcow2x

#: The limit is for an idle machine; what one core is busy with besides is in the figure.
LIMIT = 0.060
RUNS = 21


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def bench_info(benchmark, folder, fact):
    """The commands in turn, so that all of them meet the same machine."""
    path = str(folder / "disk.qcow2")
    qcow2x.create(path, 1 << 30)
    script = "import sys; from qcow2x.cli.img import main; sys.exit(main())"
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "qcow2x-img info": [sys.executable, "-c", script, "info", "--output=json", path],
        "python -m qcow2x.cli.img info": [
            *(sys.executable, "-m", "qcow2x.cli.img", "info", "--output=json", path)
        ],
    }
    if shutil.which("qemu-img"):
        commands["qemu-img info"] = ["qemu-img", "info", "--output=json", path]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(RUNS):
        for name, command in commands.items():
            times[name].append(seconds(command))
    for name, found in times.items():
        middle = statistics.median(found)
        ours = "img info" in name and not name.startswith("qemu")
        limit = f"under {LIMIT * 1000:.0f} ms" if ours else "(for comparison)"
        fact(name, f"{middle * 1000:.1f} ms", limit, middle < LIMIT if ours else None)
    benchmark.pedantic(seconds, args=(commands["qcow2x-img info"],), rounds=3)
