"""The quorum driver: one disk in several files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_helpers import qemu_img, qemu_io

import qcow2x
from qcow2x.drivers import OptionError, open_node

SIZE = 1 << 20


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(bytes(SIZE))
    return paths


def quorum(places: list[Path], threshold: int = 2, **options: Any) -> dict[str, Any]:
    children = [{"driver": "file", "filename": str(path)} for path in places]
    return {"driver": "quorum", "vote-threshold": threshold, "children": children, **options}


def test_written_everywhere_and_read_as_most_say(places: list[Path]) -> None:
    with open_node(quorum(places), writable=True) as node:
        node.pwrite(b"x" * 4096, 8192)
        node.write_zeroes(8192, 512)
    assert {path.read_bytes()[8190:8706] for path in places} == {bytes(514) + b"xx"}
    places[1].write_bytes(b"y" * SIZE)
    with open_node(quorum(places)) as node:
        assert node.pread(514, 8192) == bytes(512) + b"xx"
        assert [(e.offset, e.length, e.zero) for e in node.extents()] == [(0, SIZE, False)]


def test_no_majority_is_an_error(places: list[Path]) -> None:
    for path, byte in zip(places, b"123", strict=True):
        path.write_bytes(bytes([byte]) * SIZE)
    with open_node(quorum(places)) as node, pytest.raises(OSError, match="Input/output"):
        node.pread(512, 0)
    with open_node(quorum(places, **{"read-pattern": "fifo"})) as node:
        assert node.pread(2, 0) == b"11"


def test_minority_is_put_right_on_request(places: list[Path]) -> None:
    places[2].write_bytes(b"z" * SIZE)
    with open_node(quorum(places, **{"rewrite-corrupted": True}), writable=True) as node:
        assert node.pread(4, 512) == bytes(4)
    assert places[2].read_bytes()[510:518] == b"zz" + bytes(4) + b"zz"


def test_as_many_as_have_to_agree_must_be_written(places: list[Path]) -> None:
    nodes = quorum(places)
    broken = {"driver": "blkdebug", "inject-error": [{"event": "none", "iotype": "write"}]}
    nodes["children"][0] = {**broken, "image": nodes["children"][0]}
    with open_node(nodes, writable=True) as node:
        node.pwrite(b"abc", 0)
        assert node.pread(3, 0) == b"abc"
    nodes["vote-threshold"] = 3
    with open_node(nodes, writable=True) as node, pytest.raises(OSError, match="Errno 5"):
        node.pwrite(b"abc", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vote-threshold": 0}, "'vote-threshold' expects a value >= 1"),
        ({"vote-threshold": 4}, "threshold may not exceed children count"),
        ({"read-pattern": "all"}, "Please set read-pattern as fifo or quorum"),
        ({"children": []}, "must be 1 or more"),
        ({"children": {"1": {"driver": "null-co"}}}, "not a valid array"),
    ],
    ids=str,
)
def test_mistakes(places: list[Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        open_node({**quorum(places), **options})


def test_image_in_several_files_is_what_qemu_makes_of_it(tmp_path: Path) -> None:
    paths = [tmp_path / "a.qcow2", tmp_path / "b.qcow2"]
    for path in paths:
        qcow2x.create(path, SIZE)
    graph = {"driver": "qcow2", "file": quorum(paths)}
    with open_node(graph, writable=True) as node:
        node.pwrite(b"guest" * 1000, 70000)
        told = node.filename
    assert told.startswith("json:{") and '"vote-threshold": 2' in told
    assert paths[0].read_bytes() == paths[1].read_bytes()
    for path in paths:
        qemu_img("check", path)
        qemu_io(path, "read -P 103 70000 1")
    with open_node(told) as node:
        assert node.pread(5, 70000) == b"guest"
