"""The demo: its chart, its walks, and a small run from beginning to end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import qcow2x
from qcow2x.demo import ext4, race, story
from qcow2x.demo.chart import Group, bar_chart
from qcow2x.demo.race import Load
from qcow2x.demo.rounds import Cell, Result

PACKAGE_PARENT = Path(qcow2x.__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def qcow2x_demo(*arguments, cwd):
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from qcow2x.cli.main import main; sys.exit(main(sys.argv[1:]))",
            "demo",
            *map(str, arguments),
        ],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("values", [(0.5, 2.0), (0.0, None), (3000.0, 1.0), (0.001, 0.02)])
def test_chart_has_a_bar_for_each_value_as_long_as_it_is(values):
    text = bar_chart(
        "Speed & <size>",
        "sub",
        [("a", "#000"), ("b", "#111")],
        [Group("x<y", values)],
        (1.0, "raw"),
    )
    root = ElementTree.fromstring(text)
    assert "x<y" in [node.text for node in root.iter(f"{SVG}text")]
    bars = {node.get("fill"): float(node.get("width")) for node in root.iter(f"{SVG}rect")
            if node.get("height") == "13"}  # fmt: skip
    assert len(bars) == len([value for value in values if value is not None])
    if None not in values:
        # To a tenth of a point, which is what is written.
        assert bars["#111"] * values[0] == pytest.approx(
            bars["#000"] * values[1], abs=1 + max(values)
        )
    assert all(
        float(node.get("width")) <= float(root.get("width")) for node in root.iter(f"{SVG}rect")
    )


def test_scattered_walk_comes_to_every_place_once():
    size = 8 << 20
    load = Load.scattered(4096, size // 4096, size)
    assert sorted(load.offsets) == list(range(0, size, 4096))
    neighbours = zip(load.offsets, load.offsets[1:], strict=False)
    assert min(abs(b - a) for a, b in neighbours) > size // 4


@pytest.mark.parametrize("make", [Load.scattered, Load.sequential])
def test_walk_is_that_of_qemu_img_bench(make, tmp_path):
    """QEMU writes to the same places, so it is timed on the same work."""
    load = make(4096, 40, 2 << 20)
    raw, image = tmp_path / "raw", tmp_path / "image"
    fd = race.open_raw(raw, "writeback", load.size)
    race.time_raw_writes(load, fd)
    os.close(fd)
    written = {off for off in range(0, load.size, 4096) if any(raw.read_bytes()[off : off + 4096])}
    assert written == set(load.offsets)

    race.create_qemu(image, load.size)
    subprocess.run(
        ["qemu-io", "-c", f"write -P 1 0 {load.size}", image], check=True, stdout=subprocess.DEVNULL
    )
    assert race.time_qemu(load, image, "writeback", write=True) > 0
    with qcow2x.open(image) as opened:
        zeroed = {off for off in range(0, load.size, 4096) if not any(opened.pread(4096, off))}
    assert zeroed == written


def test_ratio_is_the_median_of_rounds_side_by_side():
    result = Result(Cell("none", "growing", "x"), 10, {"raw": [2, 2, 90], "qcow2x": [1, 4, 90]})
    assert result.ratio("qcow2x", "raw") == 1.0
    assert result.microseconds("raw") == 2e5


def test_pieces_follow_the_extents():
    extents = [(1000, 10), (5000, 20)]
    assert list(story.pieces(extents, 5, 10)) == [(0, 5, 1005), (5, 5, 5000)]
    assert list(story.pieces(extents, 12, 3)) == [(0, 3, 5002)]


def test_too_few_files_are_taken_more_than_once(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(os.urandom(10_000))
    (source / "private").write_bytes(os.urandom(10_000))
    (source / "private").chmod(0o600)
    tree = tmp_path / "tree"
    gathered = ext4.gather(tree, 25_000, (str(source),))
    assert (gathered.files, gathered.nbytes, gathered.copies) == (3, 30_000, 3)
    assert not list(tree.glob("**/private"))


def test_small_demo_runs_through_and_leaves_the_chart_alone(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = qcow2x_demo("--size=16M", "--race-seconds=0", "--dir", scratch, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything above was verified." in done.stdout
    assert "writeback, growing, 64 KiB sequential" in done.stdout
    assert list(scratch.iterdir()) == []
    chart = ElementTree.parse(tmp_path / "qcow2x-demo.svg")
    assert chart.getroot().tag == f"{SVG}svg"


def test_demo_refuses_a_disk_that_is_too_full(tmp_path):
    done = qcow2x_demo("--size=1E", "--dir", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert "free" in done.stderr and "--size" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
