"""create, resize and bench as a user types them, next to qemu-img."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_helpers import MIB, qemu, qemu_img, run


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "args",
    [
        ["-f", "qcow2", "x.img", "10M"],
        ["-f", "qcow2", "x.img", "1.5M"],
        ["-q", "-f", "qcow2", "x.img", "10M"],
        ["-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", "x.img", "1G"],
        ["-f", "qcow2", "-o", "compat=v3,lazy_refcounts", "-o", "refcount_bits=1", "x.img", "1G"],
        ["-f", "qcow2", "-o", "extended_l2=on,compression_type=zstd", "x.img", "1G"],
        ["-f", "qcow2", "-o", "preallocation=metadata", "x.img", "10M"],
        ["-f", "qcow2", "-o", "size=3M", "x.img"],
        ["-f", "qcow2", "-b", "base,1.qcow2", "-F", "qcow2", "x.img"],
        ["-f", "qcow2", "-b", "base,1.qcow2", "-F", "raw", "x.img", "7M"],
        ["-f", "qcow2", "-o", "backing_file=base,,1.qcow2,backing_fmt=qcow2", "x.img"],
        ["-f", "qcow2", "-u", "-b", "missing", "-F", "raw", "x.img", "5M"],
        ["-f", "qcow2", "-o", "data_file=file:plain.raw", "x.img", "5M"],
        ["-f", "qcow2", "-o", "data_file=file:a:b.raw", "x.img", "5M"],
        ["-f", "raw", "x.img", "10M"],
        ["x.img", "1000"],
        ["-f", "raw", "-o", "preallocation=full", "x.img", "1M"],
    ],
    ids=" ".join,
)
def test_create(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "base,1.qcow2", "2M")
    theirs = qemu_img("create", *args)
    format = "qcow2" if "qcow2" in args[:3] else "raw"
    info = qemu_img("info", "-f", format, "x.img")
    Path("x.img").unlink()
    assert run("create", *args) == 0
    assert capsys.readouterr().out == theirs
    ours = qemu_img("info", "-f", format, "x.img")
    size = re.compile("disk size: .*\n")
    assert size.sub("", ours) == size.sub("", info)


def test_create_refuses_a_backing_file_that_is_not_there() -> None:
    args = ["-f", "qcow2", "-b", "missing", "-F", "raw", "x.img", "5M"]
    assert run("create", *args) == qemu("qemu-img", "create", *args, ok=(1,)).returncode
    assert not Path("x.img").exists()


@pytest.mark.parametrize(
    "option",
    [
        "cluster_size=1234", "cluster_size=4M", "refcount_bits=3", "compat=0.10,refcount_bits=8",
        "compat=0.10,lazy_refcounts=on", "compat=2.0", "lazy_refcounts=maybe",
        "preallocation=some", "compression_type=lzma", "unknown=1",
    ],
)  # fmt: skip
def test_create_refuses(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["-q", "-f", "qcow2", "-o", option, "x.img", "1M"]
    qemu("qemu-img", "create", *args, ok=(1,))
    Path("x.img").unlink(missing_ok=True)
    assert run("create", *args) == 1
    assert capsys.readouterr().err.startswith("qcow2x: ")
    assert not Path("x.img").exists()


def test_option_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("create", "-f", "qcow2", "-o", "help") == 0
    ours = capsys.readouterr().out.splitlines()
    theirs = qemu_img("create", "-f", "qcow2", "-o", "help").splitlines()
    assert set(ours) <= set(theirs)
    assert "  cluster_size=<size>    - qcow2 cluster size" in ours
    assert run("convert", "-O", "raw", "-o", "help") == 0


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_resize(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    for tool in ("ours", "theirs"):
        qemu_img("create", "-q", "-f", format, tool, 4 * MIB)
    for args in (
        ["8M"],
        ["+1M"],
        ["-1M"],
        ["--shrink", "-1M"],
        ["-q", "+512"],
        ["--preallocation=full", "+1M"],
        ["--preallocation=some", "+1M"],
        ["--shrink", "--preallocation=full", "1M"],
        ["-100M"],
        ["--shrink", "1M"],
        ["1x"],
    ):
        *options, size = args
        theirs = qemu("qemu-img", "resize", "-f", format, *options, "theirs", size, ok=(0, 1))
        assert run("resize", "-f", format, *options, "ours", size) == theirs.returncode, args
        assert capsys.readouterr().out == theirs.stdout
        sizes = {re.search(r"virtual size.*", qemu_img("info", "-f", format, t)).group()
                 for t in ("ours", "theirs")}  # fmt: skip
        assert len(sizes) == 1, (args, sizes)
    if format == "qcow2":
        qemu_img("check", "ours")


@pytest.mark.parametrize(
    "args",
    [
        ["-c", "50"],
        ["-c", "50", "-d", "4", "-s", "8k", "-S", "16k", "-o", "4096"],
        ["-c", "50", "-w", "--pattern", "65"],
        ["-c", "50", "-w", "--flush-interval=10", "--no-drain", "-d", "4"],
        ["-c", "50", "-w", "-t", "none", "-d", "4"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_bench(format: str, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-q", "-f", format, "x.img", 4 * MIB)
    theirs = qemu_img("bench", "-f", format, *args, "x.img")
    assert run("bench", "-f", format, *args, "x.img") == 0
    number = re.compile(r"\d+\.\d+")
    assert number.sub("N", capsys.readouterr().out) == number.sub("N", theirs)
    if "--pattern" in args:
        pattern = f"read -P 65 0 {50 * 4096}"
        qemu("qemu-io", "-f", format, "-c", pattern, "x.img")
