"""The blkdebug driver: injected errors, states, breakpoints, limits."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

import qcow2x
from qcow2x.cli import words
from qcow2x.drivers import Node, open_node
from qcow2x.drivers.blkdebug import EVENTS_AT
from qcow2x.drivers.blkdebug_rules import EVENTS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_rules(*rules: dict[str, object], image: str = "a", **more: object) -> dict[str, object]:
    """qcow2 over blkdebug over the file ``image``."""
    file = {"driver": "blkdebug", "image.filename": image, **more}
    if rules:
        file["inject-error"] = list(rules)
    return {"driver": "qcow2", "file": file}


def fails(node: Node, number: int, offset: int = 0) -> None:
    with pytest.raises(OSError) as caught:
        node.pwrite(b"x" * 512, offset)
    assert caught.value.errno == number


def test_every_event_is_qemus() -> None:
    from qcow2x._core.errors import SITE_NAMES

    assert set(EVENTS_AT) <= set(SITE_NAMES)
    assert {event for events in EVENTS_AT.values() for event in events} <= EVENTS


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("once", [True, False])
def test_a_data_write_fails(folder: Path, number: int, once: bool) -> None:
    qcow2x.create("a", 1 << 20)
    rule = {"event": "write_aio", "errno": number, "once": once}
    with open_node(with_rules(rule), writable=True) as node:
        fails(node, number)
        if once:
            node.pwrite(b"y" * 512, 0)
            assert node.pread(2, 511) == b"y\0"
        else:
            fails(node, number)
            # From the first event on everything fails, what is closed with it too.
            with pytest.raises(OSError):
                node.close()
    assert qcow2x.check("a").corruptions == 0


@pytest.mark.leaks("a step failed")
@pytest.mark.parametrize(
    "event", ["cluster_alloc", "l2_alloc_write", "refblock_load", "l1_update", "l2_update"]
)
def test_no_corruption_whatever_fails(folder: Path, event: str) -> None:
    qcow2x.create("a", 1 << 20)
    node = open_node(with_rules({"event": event, "once": "on"}), writable=True)
    failed = []
    for step in (lambda: node.pwrite(b"x" * 131072, 0), node.flush, node.close):
        try:
            step()
        except OSError as exc:
            failed.append(exc.errno)
    assert errno.EIO in failed
    assert qcow2x.check("a").corruptions == 0


def test_states_and_the_file(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    Path("rules").write_text(
        '# the second write\n[set-state]\nevent = "write_aio"\nnew_state = "2"\n\n'
        '[inject-error]\nevent = "write_aio"\nstate = "2"\nerrno = "28"\n'
    )
    with open_node("blkdebug:rules:a", format="qcow2", writable=True) as node:
        assert (
            node.filename
            == (
                'json:{"driver": "qcow2", "file": {"driver": "blkdebug", "config": "rules", '
                '"image": {"driver": "file", "filename": "a"}}}'
            )
            or node.filename == "blkdebug:rules:a"
        )
        node.pwrite(b"x" * 65536, 0)
        fails(node, errno.ENOSPC)
        with pytest.raises(OSError):
            node.close()


def test_a_sector_and_a_kind_of_request(folder: Path) -> None:
    Path("a").write_bytes(b"x" * 8192)
    rules = [
        {"event": "none", "iotype": "read", "sector": 2},
        {"event": "none", "iotype": "block-status", "sector": 4},
    ]
    target = {"driver": "blkdebug", "image": {"filename": "a"}, "inject-error": rules}
    with open_node(target, writable=True) as node:
        node.pwrite(b"y" * 8192, 0)
        assert node.pread(1024, 0) == b"y" * 1024
        with pytest.raises(qcow2x.StorageError):
            node.pread(1024, 1023)
        assert [run.length for run in node.extents(0, 2048)] == [2048]
        with pytest.raises(qcow2x.StorageError):
            list(node.extents())


def test_breakpoints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qcow2x.create("a", 1 << 20)
    with open_node(with_rules(), writable=True) as node:
        node.debug.suspend_at("write_aio", "A")
        thread = threading.Thread(target=node.pwrite, args=(b"x" * 512, 0))
        thread.start()
        node.debug.wait_suspended("A")
        assert node.pread(4, 0) == bytes(4)
        node.debug.resume("A")
        thread.join()
        assert node.pread(4, 0) == b"xxxx"
        with pytest.raises(OSError):
            node.debug.resume("A")
        with pytest.raises(OSError):
            node.debug.suspend_at("never", "A")
        node.debug.suspend_at("write_aio", "B")
        node.debug.remove_breakpoint("B")
        node.pwrite(b"x", 0)
    assert capsys.readouterr().out == (
        "blkdebug: Suspended request 'A'\nblkdebug: Resuming request 'A'\n"
    )
    with open_node("a") as node, pytest.raises(OSError):
        node.debug.suspend_at("write_aio", "A")


@pytest.mark.parametrize("limits", ["align=4k", "align=512,max-transfer=1k", "opt-write-zero=15k"])
def test_limits_change_no_byte(folder: Path, limits: str) -> None:
    Path("a").write_bytes(bytes(1 << 16))
    expected = bytearray(1 << 16)
    spec = f"driver=blkdebug,image.filename=a,max-write-zero=15k,max-discard=15k,{limits}"
    if "15k" not in limits:
        spec = spec.replace("15k", "60k")
    with open_node(spec, image_opts=True, writable=True) as node:
        for at, nbytes in ((0, 1), (4095, 2), (1000, 20000), (65535, 1), (8192, 4096)):
            node.pwrite(b"x" * nbytes, at)
            expected[at : at + nbytes] = b"x" * nbytes
        for at, nbytes in ((1, 3), (5000, 9000), (30000, 35536)):
            node.write_zeroes(at, nbytes)
            expected[at : at + nbytes] = bytes(nbytes)
        node.discard(100, 10)
        assert node.pread(1 << 16, 0) == bytes(expected)
        assert node.pread(5000, 777) == bytes(expected[777:5777])


def test_a_filter_over_an_image(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    spec = "driver=blkdebug,image.driver=qcow2,image.file.filename=a,align=4k"
    with open_node(spec, image_opts=True, writable=True) as node:
        node.pwrite(b"x" * 100, 5000)
        node.write_zeroes(131072, 65536)
        assert node.pread(102, 4999) == b"\0" + b"x" * 100 + b"\0"
        assert [(r.length, r.data) for r in node.extents(0, 131072)] == [
            (65536, True),
            (65536, False),
        ]
    assert qcow2x.check("a").clean


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"align": 3}, "Cannot meet constraints with align 3"),
        ({"align": 4096, "max-transfer": 512}, "Cannot meet constraints with max-transfer 512"),
        ({"set-state": [{"state": 1}]}, "Missing event name for rule"),
        ({"set-state": [{"event": "no"}]}, "invalid parameter value: no"),
        ({"config": "none"}, "Could not read blkdebug config file: No such file or directory"),
    ],
)
def test_what_is_wrong(folder: Path, more: dict[str, object], text: str) -> None:
    qcow2x.create("a", 1 << 20)
    with pytest.raises(ValueError) as caught:
        open_node(with_rules(**more))  # type: ignore[arg-type]
    assert words.reason(caught.value) == text


def test_leaving_a_with_block_tells_what_went_wrong_first(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    with (
        pytest.raises(KeyError),
        open_node(with_rules({"event": "write_aio"}), writable=True) as node,
    ):
        fails(node, errno.EIO)
        raise KeyError


def test_the_image_hears_of_data_in_another_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20, data_file=tmp_path / "data")
    for kind, at in (("write_aio", 0), ("read_aio", 0)):
        options = {
            "driver": "qcow2",
            "file": {
                "driver": "blkdebug",
                "image": {"driver": "file", "filename": str(path)},
                "set-state": [{"event": kind, "new_state": 2}],
                "inject-error": [{"event": kind, "state": 2, "errno": 5}],
            },
        }
        with open_node(options, writable=True) as node:
            (node.pwrite(b"x", at) if kind == "write_aio" else node.pread(1, at))
            rules: Any = node.children["file"]
            assert rules.rules._state == 2
