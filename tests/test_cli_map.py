"""map: what is printed, beside QEMU's own tool."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from cli_helpers import MIB, disk_bytes, qemu_img, qemu_io, run, write_sparse

import qcow2x


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three layers with data, zeros of every sort and holes; the names are relative."""
    monkeypatch.chdir(tmp_path)
    write_sparse(tmp_path / "disk.raw", disk_bytes())
    qemu_img("create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "mid.qcow2", "4M")
    qemu_io("mid.qcow2", "write -P 7 1M 128k", "write -z 64k 128k", "write -P 0 2M 64k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "5M")
    qemu_io(
        "top.qcow2",
        "write -P 9 1088k 64k",
        "write -P 1 3M 256k",
        "write -z 3136k 64k",
        "discard 3200k 64k",
        "write -z -u 4M 100k",
    )
    return Path("top.qcow2")


def same(capsys: pytest.CaptureFixture[str], *args: object) -> None:
    """Ours prints what QEMU's tool prints, and fails where it fails."""
    theirs = subprocess.run(
        ["qemu-img", "map", *map(str, args)], capture_output=True, text=True, check=False
    )
    assert run("map", *args) == theirs.returncode
    ours = capsys.readouterr()
    expected = theirs.stdout
    if "--output=json" in args:
        # What the release that is stood in for says besides.
        told = json.loads(ours.out)
        for entry in told:
            assert entry.pop("compressed") in (True, False)
        assert told == json.loads(expected)
    else:
        assert ours.out == expected
    assert ours.err.replace("qcow2x:", "qemu-img:") == theirs.stderr


@pytest.mark.parametrize("style", ["human", "json"])
def test_chain(chain: Path, style: str, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (
        [],
        ["-f", "qcow2"],
        ["-U"],
        ["--start-offset", "1M"],
        ["-s", "100k", "-l", "1M"],
        ["--max-length=10G"],
        ["-s", "5M"],
        ["-s", "6M"],
        ["-l", "0"],
    ):
        same(capsys, f"--output={style}", *args, chain)
    same(capsys, f"--output={style}", "mid.qcow2")
    same(capsys, f"--output={style}", "-f", "raw", "disk.raw")
    same(capsys, f"--output={style}", "--image-opts", f"driver=qcow2,file.filename={chain}")


def test_laid_out_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "ahead.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, "8M")
    qemu_io(image, "write 1M 64k")
    same(capsys, image)
    same(capsys, "--output=json", image)


def test_compressed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "packed.qcow2"
    (tmp_path / "text").write_bytes(b"a line of text\n" * 20000)
    qcow2x.convert(tmp_path / "text", image, compress=True)
    same(capsys, image)
    same(capsys, "--output=json", image)
    assert run("map", "--output=json", image) == 0
    told = json.loads(capsys.readouterr().out)
    assert told[0]["compressed"]
    assert "offset" not in told[0]


@pytest.mark.parametrize(
    "args",
    [
        ["missing"],
        [],
        ["-s", "x", "f"],
        ["--output=xml", "disk.raw"],
        ["-f", "qcow2", "disk.raw"],
        ["--image-opts", "-f", "raw", "driver=raw,file.filename=disk.raw"],
    ],
    ids=" ".join,
)
def test_mistakes(chain: Path, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    theirs = subprocess.run(["qemu-img", "map", *args], capture_output=True, text=True, check=False)
    assert run("map", *args) == theirs.returncode == 1
    err = capsys.readouterr().err.replace("qcow2x:", "qemu-img:").replace("qcow2x ", "qemu-img ")
    assert err == theirs.stderr


def test_external_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, data = tmp_path / "image.qcow2", tmp_path / "data.raw"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", image, 4 * MIB)
    qemu_io(image, "write -P 3 1M 64k")
    same(capsys, image)
    same(capsys, "--output=json", image)
