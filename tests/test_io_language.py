"""qcow2x-io: the command language, with the words and formats of qemu-io."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.qemu import qemu_img, tool

import qcow2x
from qcow2x.cli.io import main, units
from qcow2x.cli.io.language import Failed

_TIMES = re.compile(r"[0-9]+ ops; [0-9:.]+( sec)? \([^)]*\)")
_RATES = re.compile(r"^(\d+,1,)[0-9:.,inf]+$", re.MULTILINE)


def plain(text: str) -> str:
    """Without times, and without the name of the program."""
    text = _RATES.sub(r"\1T", _TIMES.sub("X ops", text))
    # The option -r of 10.0, which registers buffers, is not in older synopses.
    text = re.sub(r"\[-([a-zA-Z]*)r([a-zA-Z]*)\] ", r"[-\1\2] ", text)
    return text.replace("qcow2x-io", "PROGRAM").replace("qemu-io", "PROGRAM")


def ours(*args: object, script: str | None = None) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-m", "qcow2x.cli.io", *map(str, args)],
        env=environment,
        input=script,
        stdin=subprocess.DEVNULL if script is None else None,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def theirs(*args: object, script: str | None = None) -> tuple[int, str, str]:
    done = subprocess.run(
        [tool("qemu-io"), *map(str, args)],
        input=script,
        stdin=subprocess.DEVNULL if script is None else None,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def both(tmp_path: Path, *commands: str, script: bool = False, size: str = "1M") -> None:
    """The same commands on the same image: the same text, the same status."""
    found = []
    for run in (ours, theirs):
        path = tmp_path / "disk.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", path, size)
        if script:
            found.append(run("-f", "qcow2", path, script="\n".join(commands)))
        else:
            args = [arg for command in commands for arg in ("-c", command)]
            found.append(run("-f", "qcow2", *args, path))
    (status, out, err), (their_status, their_out, their_err) = found
    assert plain(out) == plain(their_out)
    assert plain(err) == plain(their_err)
    assert status == their_status


def test_reads_and_writes_as_qemu_io_prints_them(tmp_path: Path) -> None:
    pattern = tmp_path / "pattern"
    pattern.write_bytes(bytes(range(100)))
    both(
        tmp_path,
        "write -P 0x5a 0 64k",
        "read -P 0x5a 0 64k",
        "read -P 1 0 64k",
        "read -P 0x5a -s 1k -l 2k 0 64k",
        "read -P 1 -s 1k -l 2k 0 64k",
        "read -v 65530 40",
        f"write -s {pattern} 100k 3000",
        "read -v 100k 32",
        "writev -P 7 200k 1k 2k 512",
        "readv -P 7 200k 3584",
        "readv -P 8 200k 3584",
        "write -z 64k 64k",
        "write -z -u 0 128k",
        "write -c -P 9 512k 64k",
        "read -q -P 9 512k 64k",
        "read -C 0 1k",
        "write -C -f 0 1k",
        "discard 0 64k",
        "discard -C 0 64k",
        "alloc 0 1M",
        "alloc 64k",
        "alloc 0 2M",
        "alloc 1M",
        "map",
        "length",
        "truncate 2M",
        "length",
        "flush",
        "write -b -P 3 0 1k",
        "read -b -P 3 0 1k",
    )


def test_mistakes_in_qemu_io_s_words(tmp_path: Path) -> None:
    both(
        tmp_path,
        "read 0 2M",
        "write 1M 512",
        "read 0 1x",
        "read 0 9E",
        "read 0 3G",
        "read -P 300 0 512",
        "read -P x 0 512",
        "read -s 1 0 512",
        "read -P 1 -s 600 0 512",
        "read -b 7 512",
        "write",
        "write 0",
        "write 0 1 2",
        "write -z -P 1 0 1k",
        "write -z -b 0 1k",
        "write -f -c 0 1k",
        "write -n 0 1k",
        "write -u 0 1k",
        "write -c 1 512",
        "writev 0 1k 3G",
        "nothing",
        "truncate 1000",
        "truncate -m what 1M",
        "discard 2M 1k",
        "sigraise 1000",
        "sleep x",
        "break a b",
        "resume a",
        "help nothing",
        "open x",
        "reopen -r -w",
        "reopen x",
        "close",
        "length",
        "read 0 512",
    )


def test_a_script_on_standard_input(tmp_path: Path) -> None:
    both(
        tmp_path,
        "write 0 1k",
        "",
        "  read   -P 0xcd  0 1k ",
        "length",
        "quit",
        "nothing",
        script=True,
    )
    both(tmp_path, "write 0 1k", "read -P 1 0 1k", script=True)


def test_help_lists_every_command() -> None:
    status, out, _ = ours("-c", "help")
    assert status == 0
    listed = [line.split(" ")[0] for line in out.splitlines()]
    names = [c for c in listed if c and c != "Use"]
    assert names == sorted(names)
    assert {"read", "aio_write", "wait_break", "zone_append", "reopen", "sigraise"} <= set(names)
    for name in names:
        status, out, err = ours("-c", f"help {name}")
        assert (status, err) == (0, "") and out.startswith(f"{name} ")


@pytest.mark.parametrize("args", [["-h"], ["-V"]])
def test_options_that_only_tell(args: list[str]) -> None:
    status, out, err = ours(*args)
    assert status == 0 and out and not err


def test_options_of_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    assert main(["-r", "-c", "write 0 1k", str(path)]) == 1
    assert "Block node is read-only" in capsys.readouterr().err
    assert main(["-t", "what", str(path)]) == 1
    assert "Invalid cache option: what" in capsys.readouterr().err
    assert main(["-d", "what", str(path)]) == 1
    assert "Invalid discard option: what" in capsys.readouterr().err
    assert main(["-i", "what", str(path)]) == 1
    assert "Invalid aio option: what" in capsys.readouterr().err
    assert main(["-f", "qcow2", "--image-opts", str(path)]) == 1
    assert "mutually exclusive" in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 1
    assert "can't open device" in capsys.readouterr().err
    opts = f"driver=qcow2,file.filename={path}"
    assert main(["--image-opts", "-c", "write -P 1 0 1k", opts]) == 0
    assert main(["-c", "open -o driver=qcow2 " + str(path), "-c", "read -P 1 0 1k"]) == 0
    assert main(["-m", "-n", "-c", "read -P 1 0 1k", "-c", "read -P 1 512 512", str(path)]) == 0
    assert main(["-d", "ignore", "-c", "discard 0 64k", "-c", "read -P 1 0 1k", str(path)]) == 0
    capsys.readouterr()
    # The overlay takes the writes, and is gone afterwards.
    assert main(["-s", "-c", "write -P 2 0 1k", "-c", "read -P 2 0 1k", str(path)]) == 0
    assert main(["-c", "read -P 1 0 1k", str(path)]) == 0


def test_reopen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "disk.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    args = ["-c", "write -P 1 0 1k", "-c", "reopen -r", "-c", "write 0 1k", "-c", "reopen -w"]
    assert main([*args, "-c", "write -P 2 0 1k", "-c", "read -P 2 0 1k", path]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("Block node is read-only") == 1
    assert captured.out.count("wrote 1024/1024") == 2
    # What fails leaves the file open as it was.
    assert main(["-c", "reopen -o overlap-check=what", "-c", "read -P 2 0 1k", path]) == 1
    assert "read 1024/1024" in capsys.readouterr().out


def test_sizes_and_times() -> None:
    assert units.number("1.5k") == 1536
    assert units.number("0x10") == 16
    with pytest.raises(Failed, match="too large"):
        units.number("8E")
    assert [units.size_text(n) for n in (0, 1, 1023, 1024, 1536, 1 << 60)] == [
        "0 bytes",
        "1 bytes",
        "1023 bytes",
        "1 KiB",
        "1.500 KiB",
        "1 EiB",
    ]
    assert units.time_text(12_345_678, False) == "00.01 sec"
    assert units.time_text(3_661_500_000_000, False) == "1:01:01.50"
    assert units.time_text(0, True) == "0:00:00.00"
    assert [units.integer(t) for t in ("010", "0x1f", "-3", "08", "1k", "")] == [
        8, 31, -3, None, None, None,
    ]  # fmt: skip


def test_native_aio_needs_an_uncached_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(4096))
    for flag in (["-k"], ["-i", "native"]):
        args = [*flag, "-f", "raw", "-c", "read 0 4k"]
        assert main([*args, str(path)]) == 1
        assert "it requires cache.direct=on" in capsys.readouterr().err
        assert main(["-n", *args, str(path)]) == 0
    assert main(["-i", "io_uring", "-f", "raw", "-c", "read 0 4k", str(path)]) == 0


def test_rules_outlive_a_reopen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are used up stay so, and the state stays what it has become."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 20)
    once = "inject-error.0.event=read_aio,inject-error.0.once=on,inject-error.0.state=2"
    state = "set-state.0.event=write_aio,set-state.0.new_state=2"
    options = f"driver=qcow2,file.driver=blkdebug,file.image.filename={path},"
    options += ",".join(f"file.{one}" for one in (once + "," + state).split(","))
    script = ["write 0 64k", "reopen -r", "read 0 64k", "reopen -r", "read 0 64k"]
    args = [word for line in script for word in ("-c", line)]
    assert main(["--image-opts", *args, options]) == 1
    out, err = capsys.readouterr()
    assert (out + err).count("read failed: Input/output error") == 1
    assert out.count("read 65536/65536") == 1
