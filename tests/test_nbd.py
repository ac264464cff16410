"""The nbd driver against qemu-nbd."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.qemu import tool

import qcow2x
from qcow2x.cli import words
from qcow2x.drivers import OptionError, open_node
from qcow2x.drivers.nbd import NbdNode


@contextmanager
def served(*arguments: str) -> Iterator[None]:
    """A server on the socket ``s`` in the working folder."""
    server = subprocess.Popen([tool("qemu-nbd"), "-k", str(Path("s").absolute()), "-t", *arguments])
    try:
        while not Path("s").exists():
            assert server.poll() is None
            time.sleep(0.01)
        yield
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_read_write_zero_and_trim(folder: Path) -> None:
    Path("a").write_bytes(b"x" * (1 << 20) + b"tail")
    with served("-f", "raw", "--discard=unmap", "a"):
        with open_node("nbd:unix:s", writable=True) as node:
            assert (node.driver, node.file and node.file.driver) == ("raw", "nbd")
            assert node.filename == "nbd+unix://?socket=s"
            node.pwrite(b"y" * 1000, 500)
            node.write_zeroes(4096, 8192)
            node.discard(65536, 65536)
            node.flush()
            assert node.pread(1000, 0) == b"x" * 500 + b"y" * 500
            assert node.pread(8192, 4096) == bytes(8192)
            runs = list(node.extents())
            assert sum(run.length for run in runs) == node.size == (1 << 20) + 512
            assert any(run.zero for run in runs)
        with pytest.raises(OSError), open_node("nbd:unix:s", writable=True) as node:
            node.resize(1 << 21)
    assert Path("a").read_bytes()[:1500] == b"x" * 500 + b"y" * 1000


def test_an_image_over_nbd(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    # A server cannot make its file longer: the image grows into what is there.
    os.truncate("a", 1 << 21)
    with served("-f", "raw", "-x", "e", "a"):
        uri = "nbd+unix:///e?socket=s"
        with open_node(uri, writable=True) as node:
            assert node.driver == "qcow2" and node.filename == uri
            node.pwrite(b"x" * 70000, 1000)
        with open_node(
            "driver=qcow2,file.driver=nbd,file.path=s,file.export=e", image_opts=True
        ) as node:
            assert node.pread(2, 70999) == b"x\0"
    assert qcow2x.check("a").clean


def test_depth_and_bitmaps(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    with open_node("a", writable=True) as node:
        node.pwrite(b"x" * 65536, 0)
    qcow2x.create("b", 1 << 20, backing_file="a", backing_format="qcow2")
    with qcow2x.open("b", "r+", references="follow") as image:
        image.bitmaps.add("dirty")
        image.pwrite(b"y" * 65536, 65536)
    spec = "driver=nbd,server.type=unix,server.path=s,export=,x-dirty-bitmap="
    with served("-r", "-f", "qcow2", "-A", "-B", "dirty", "b"):
        with open_node(spec + "qemu:allocation-depth", image_opts=True) as node:
            assert [(r.length, r.data, r.zero) for r in node.extents()] == [
                (65536, True, True),
                (65536, False, False),
                ((1 << 20) - 131072, True, False),
            ]
        with open_node(spec + "qemu:dirty-bitmap:dirty", image_opts=True) as node:
            assert [(r.offset, r.length) for r in node.extents() if not r.data] == [(65536, 65536)]
        with pytest.raises(OptionError, match="requested x-dirty-bitmap no:no not found"):
            open_node(spec + "no:no", image_opts=True)
        with pytest.raises(Exception) as caught:
            open_node("nbd:unix:s", writable=True)
        assert words.reason(caught.value) == (
            "request on write denied without write permission: Permission denied"
        )


def test_no_server(folder: Path) -> None:
    with pytest.raises(Exception) as caught:
        open_node("nbd:unix:none")
    assert words.opening(caught.value, "nbd:unix:none") == (
        "Could not open 'nbd:unix:none': Failed to connect to 'none': No such file or directory"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nbd:unix:/s:exportname=e", {"server.type": "unix", "server.path": "/s", "export": "e"}),
        ("nbd:h:1", {"server.type": "inet", "server.host": "h", "server.port": "1"}),
        ("nbd:[::1]:1", {"server.type": "inet", "server.host": "::1", "server.port": "1"}),
        ("nbd://h", {"server.type": "inet", "server.host": "h", "server.port": "10809"}),
        ("nbd+unix:///e?socket=/s", {"server.type": "unix", "server.path": "/s", "export": "e"}),
    ],
)
def test_names(name: str, expected: dict[str, str]) -> None:
    options: dict[str, object] = {}
    NbdNode.parse_filename(name, options)
    assert options == expected


@pytest.mark.parametrize(
    "name", ["nbd+unix:///e", "nbd://", "nbd://h?x=1", "nbd+unix://h?socket=s"]
)
def test_names_refused(name: str) -> None:
    with pytest.raises(OptionError, match="No valid URL specified"):
        NbdNode.parse_filename(name, {})


def test_convert_overwrites_an_export(folder: Path) -> None:
    from cli_helpers import run

    content = b"new" * 200_000 + bytes(424)
    Path("source").write_bytes(content.ljust(1 << 20, b"\0"))
    Path("a").write_bytes(b"old." * (1 << 18))
    with served("-f", "raw", "a"):
        assert run("convert", "-f", "raw", "-O", "raw", "source", "nbd:unix:s") == 0
        assert run("compare", "-q", "-f", "raw", "-F", "raw", "source", "nbd:unix:s") == 0
        Path("longer").write_bytes(bytes(2 << 20))
        assert run("convert", "-f", "raw", "-O", "raw", "longer", "nbd:unix:s") == 1
    assert Path("a").read_bytes() == Path("source").read_bytes()


def test_images_are_made_in_an_export(folder: Path) -> None:
    """One that has room for them: it cannot grow."""
    from cli_helpers import qemu_img, run

    Path("source").write_bytes(random.Random(1).randbytes(1 << 20))
    Path("a").write_bytes(bytes(4 << 20))
    secret = ("--object", "secret,id=k,data=x")
    with served("-f", "raw", "a"):
        assert run("create", "-q", "-f", "qcow2", "nbd:unix:s", "64M") == 0
        assert run("info", "nbd:unix:s") == 0
        for compressed in ((), ("-c",)):
            made = run("convert", "-f", "raw", "-O", "qcow2", *compressed, "source", "nbd:unix:s")
            assert made == 0
            qemu_img("check", "nbd:unix:s")
            qemu_img("compare", "-f", "raw", "-F", "qcow2", "source", "nbd:unix:s")
        keyed = (*secret, "-o", "key-secret=k,iter-time=10")
        assert run("convert", *keyed, "-f", "raw", "-O", "luks", "source", "nbd:unix:s") == 0
        assert run("create", "-q", "-f", "raw", "nbd:unix:s", "4M") == 0
        assert run("create", "-q", "-f", "raw", "nbd:unix:s", "5M") == 1
        Path("longer").write_bytes(random.Random(2).randbytes(5 << 20))
        assert run("convert", "-f", "raw", "-O", "qcow2", "longer", "nbd:unix:s") == 1
    assert run("create", "-q", "-f", "qcow2", "nbd:unix:none", "1M") == 1
