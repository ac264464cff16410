"""Bitmaps as QEMU sees them."""

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.qemu import Path_, qemu_img, qemu_info, tool


def listed(path: Path_) -> dict[str, dict[str, Any]]:
    """What ``qemu-img info`` says of each bitmap."""
    said = qemu_info(path)["format-specific"]["data"].get("bitmaps", [])
    return {entry["name"]: entry for entry in said}


@contextmanager
def served(path: Path_, bitmap: str) -> Iterator[str]:
    """The image behind qemu-nbd, with the bitmap; yields the socket."""
    with tempfile.TemporaryDirectory() as folder:
        socket = str(Path(folder) / "nbd")
        command = [tool("qemu-nbd"), "-f", "qcow2", "-k", socket, "-B", bitmap, "-t", str(path)]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            for _ in range(600):
                if Path(socket).exists():
                    break
                assert server.poll() is None, server.communicate()
                time.sleep(0.02)
            yield socket
        finally:
            server.terminate()
            server.communicate(timeout=60)


def dirty_in_qemu(path: Path_, bitmap: str) -> list[tuple[int, int]]:
    """The dirty runs ``(offset, length)`` that QEMU finds in a bitmap."""
    with served(path, bitmap) as socket:
        options = (
            f"driver=nbd,server.type=unix,server.path={socket},"
            f"x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
        )
        found = json.loads(qemu_img("map", "--output=json", "--image-opts", options))
    # In this view of an export "data" stands for clean.
    runs: list[tuple[int, int]] = []
    for run in found:
        if run["data"]:
            continue
        if runs and sum(runs[-1]) == run["start"]:
            runs[-1] = (runs[-1][0], runs[-1][1] + run["length"])
        else:
            runs.append((run["start"], run["length"]))
    return runs
