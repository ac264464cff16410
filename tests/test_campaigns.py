"""The campaigns see what they are there to see, and their figures become a page."""

from __future__ import annotations

import ast
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from campaigns import crash, faults, mutants
from campaigns.fuzz import qemu
from campaigns.power import SECTOR, Machine, unsynced

import qcow2x

ROOT = Path(__file__).resolve().parent.parent


def test_every_edge_of_the_header_is_known_to_the_core_and_kept_by_it() -> None:
    names = {edge.name for edge in mutants.edges_of_the_core(ROOT / "include")}
    core = ROOT / "qcow2x" / "_core"
    declared = set(re.findall(r"Q2_EDGE_(\w+)", (core / "edges.pxd").read_text()))
    assert declared == {*names, "NONE"}
    kept = {
        name for pyx in core.glob("*.pyx") for name in re.findall(r"Q2_EDGE_(\w+)", pyx.read_text())
    }
    assert kept - {"NONE"} == names


def test_every_edge_of_a_python_module_is_a_statement_there() -> None:
    for name in mutants.IN_PYTHON:
        module = name.split(":")[0]
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert name in [found for found, _, _ in mutants._statements(module, tree)]


def test_a_missing_edge_is_missed() -> None:
    # A flush of the target before the header names another backing file.
    edge = "qcow2x.ops.rebase:rebase_layers:1"
    done = subprocess.run(
        [sys.executable, "-m", "campaigns.mutants", "--child", "--edge", edge],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(Path(qcow2x.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    found = mutants.Found(*json.loads(done.stdout))
    assert found.workload == "rebase"
    assert "the image reads differently" in found.what


def test_states_hold_what_was_flushed_and_any_part_of_what_was_not() -> None:
    machine = Machine()
    file = machine.file(bytes(2 * SECTOR))
    file.pwrite(b"a" * 2 * SECTOR, 0)
    file.flush()
    file.pwrite(b"b" * 2 * SECTOR, 0)
    with unsynced():
        file.flush()
    states = list(machine.states(random.Random(1), 50))
    after = {bytes(state.files[0]) for state in states if state.happened >= 2}
    parts = {(data[0], data[SECTOR]) for data in after}
    assert parts == {(97, 97), (98, 97), (97, 98), (98, 98)}


@pytest.mark.parametrize("campaign", ["crash", "faults"])
def test_a_short_campaign_finds_nothing_and_leaves_its_figures(
    campaign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / f"{campaign}.json"
    if campaign == "crash":
        arguments = ["--workload", "overwrite", "--qemu-every", "50"]
        assert crash.main([*arguments, f"--json={figures}"]) == 0
    else:
        assert faults.main(["--verb", "discard", f"--json={figures}"]) == 0
    assert ", 0 failed" in capsys.readouterr().out
    page = tmp_path / "page.md"
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "reliability.py", tmp_path, page], check=True
    )
    text = page.read_text()
    assert ("| overwrite | 1 |" if campaign == "crash" else "| discard: EIO |") in text


def test_a_python_storage_may_promise_zeros_past_its_end() -> None:
    """Then a part of a new cluster is written alone, as in a file."""
    written = {}
    for promise in (False, True):
        machine = Machine()
        file = machine.file()
        file.zero_past_end = promise
        qcow2x.create(file, 1 << 20)
        with qcow2x.open(file, "r+") as image:
            image.pwrite(b"x" * SECTOR, SECTOR)
            longest = max(len(call[2]) for _, call in machine.log if call[0] == "write")
            assert image.pread(3 * SECTOR, 0) == bytes(SECTOR) + b"x" * SECTOR + bytes(SECTOR)
            written[promise] = longest, file.size()
    assert written[True] != written[False]


def test_qemus_fuzzer_hears_of_more_than_signals(tmp_path: Path) -> None:
    watch = qemu.Watch()
    path = tmp_path / "disk.qcow2"
    log = io.StringIO()
    assert watch.run_app(log, ["qemu-img", "create", "-f", "qcow2", str(path), "1M"]) == 0
    assert watch.run_app(log, ["qemu-img", "check", "-f", "qcow2", str(path)]) == 0
    assert "No errors were found" in log.getvalue()
    assert watch.run_app(log, ["qemu-io", str(path), "-c", "write 0 4k"]) == 0
    assert watch.run_app(log, ["qemu-img", "info", str(tmp_path / "missing")]) == 1
    assert not watch.wrong
    watch.programs["qemu-img"] = lambda words: os.kill(os.getpid(), signal.SIGKILL)
    assert watch.run_app(log, ["qemu-img", "info", str(path)]) == -6
    watch.programs["qemu-img"] = lambda words: 1 // 0
    assert watch.run_app(log, ["qemu-img", "info", str(path)]) == -6
    watch.programs["qemu-img"] = lambda words: 3
    assert watch.run_app(log, ["qemu-img", "check", str(path)]) == 3
    assert watch.run_app(log, ["qemu-img", "info", str(path)]) == -6
    assert [what.split(":")[0] for what in watch.wrong] == [
        "died of SIGKILL",
        "a traceback",
        "exit status 3",
    ]
    assert qemu.wrong_with(["qemu-img", "info"], 0, "", qemu.MEMORY + 1)
