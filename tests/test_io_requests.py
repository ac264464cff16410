"""qcow2x-io: requests beside the commands, breakpoints, and programs that die."""

import signal
from pathlib import Path

from support.qemu import check_clean, qemu_check, qemu_img
from test_io_language import ours, plain

import qcow2x


def image(tmp_path: Path, *options: str) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *options, path, "4M")
    return path


def test_requests_are_told_of_in_the_order_they_were_given_in(tmp_path: Path) -> None:
    path = image(tmp_path)
    script = [f"aio_write -P {n} {n * 64}k 64k" for n in range(20)]
    script += ["aio_flush", *[f"aio_read -P {n} {n * 64}k 64k" for n in range(20)], "aio_flush"]
    script += [
        "aio_read -P 9 0 64k",
        "aio_flush",
        "aio_discard 0 64k",
        "aio_flush",
        "read -P 0 0 64k",
    ]
    status, out, err = ours(path, script="\n".join(script))
    assert (status, err) == (0, "")
    told = [line for line in plain(out).replace("PROGRAM> ", "").splitlines() if "/" in line]
    offsets = [f"{n * 65536}" for n in range(20)]
    assert [line.split()[-1] for line in told if line.startswith("wrote")] == offsets
    assert [line.split()[-1] for line in told if line.startswith("read")][:20] == offsets
    assert "Pattern verification failed at offset 0, 65536 bytes" in out
    assert "discarded  65536/65536 bytes at offset 0" in out
    check_clean(path)


def test_what_overlaps_takes_effect_in_order(tmp_path: Path) -> None:
    path = image(tmp_path)
    script = [f"aio_write -P {n} {n}k 64k" for n in range(40)]
    status, out, _ = ours(path, script="\n".join([*script, "aio_flush", "read -P 39 39k 64k"]))
    assert status == 0 and "failed" not in out
    with qcow2x.open(path) as opened:
        assert opened.pread(40 << 10, 0) == b"".join(bytes([n]) * 1024 for n in range(40))


def test_a_failed_request_is_told_and_the_status_is_not_its_own(tmp_path: Path) -> None:
    status, out, _ = ours(
        "-c", "aio_write 4M 64k", "-c", "aio_read 4M 64k", "-c", "aio_flush", image(tmp_path)
    )
    assert status == 0
    assert out == "aio_write failed: Input/output error\nreadv failed: Input/output error\n"


def test_requests_left_are_waited_for(tmp_path: Path) -> None:
    path = image(tmp_path)
    status, out, _ = ours("-c", "aio_write -P 5 0 64k", path)
    assert status == 0 and "wrote 65536/65536" in out
    assert ours("-c", "read -P 5 0 64k", path)[0] == 0


def test_a_breakpoint_stops_a_request_until_it_is_resumed(tmp_path: Path) -> None:
    path = image(tmp_path)
    script = """\
break write_aio A
aio_write -P 1 0 4k
wait_break A
aio_write -P 2 8k 4k
resume A
aio_flush
read -P 1 0 4k
read -P 2 8k 4k
remove_break A
"""
    status, out, _ = ours(f"blkdebug::{path}", script=script)
    assert "blkdebug: Suspended request 'A'\n" in out
    assert out.index("Suspended") < out.index("Resuming") < out.index("wrote")
    assert "failed" not in out.replace("Could not remove breakpoint", "")
    check_clean(path)


def test_a_killed_program_leaves_what_a_crash_leaves(tmp_path: Path) -> None:
    path = image(tmp_path)
    kill = f"sigraise {int(signal.SIGKILL)}"
    status, out, _ = ours("-t", "writeback", "-c", "write -P 1 0 64k", "-c", kill, path)
    assert status == -signal.SIGKILL
    # What was printed before is not lost.
    assert "wrote 65536/65536" in out
    found = qemu_check(path)
    assert not found.get("corruptions")
    # In a durable mode the write is there.
    ours("-t", "writethrough", "-c", "write -P 2 0 64k", "-c", kill, path)
    assert ours("-r", "-c", "read -P 2 0 64k", path)[0] == 0


def test_a_killed_program_leaves_lazy_refcounts_behind(tmp_path: Path) -> None:
    path = image(tmp_path, "-o", "lazy_refcounts=on")
    ours("-c", "write -P 1 0 64k", "-c", f"sigraise {int(signal.SIGKILL)}", path)
    with qcow2x.open(path) as opened:
        assert opened.info().dirty
        assert opened.pread(65536, 0) == b"\x01" * 65536
    assert ours("-c", "read -P 1 0 64k", path)[0] == 0
    check_clean(path)


def test_abort(tmp_path: Path) -> None:
    path = image(tmp_path)
    assert ours("-c", "write 0 64k", "-c", "abort", path)[0] == -signal.SIGABRT
    assert not qemu_check(path).get("corruptions")


def test_bitmaps_do_not_outlive_a_program_that_dies(tmp_path: Path) -> None:
    """Also where it wrote nothing, as with QEMU; one that ends in order leaves them as they were."""
    path = image(tmp_path)
    with qcow2x.open(path, "r+") as opened:
        opened.bitmaps.add("on")
        opened.bitmaps.add("off", enabled=False)
    ours("-c", "read 0 64k", path)
    with qcow2x.open(path) as opened:
        assert not any(bitmap.in_use for bitmap in opened.bitmaps.values())
    assert ours("-c", "abort", path)[0] == -signal.SIGABRT
    with qcow2x.open(path) as opened:
        assert all(bitmap.inconsistent for bitmap in opened.bitmaps.values())


def test_zones_are_refused(tmp_path: Path) -> None:
    status, out, _ = ours("-c", "zrp 0 1", "-c", "zo 0 1M", "-c", "zap -p 0 4k", image(tmp_path))
    assert status == 1
    assert out.splitlines() == [
        f"zone {what} failed: Operation not supported" for what in ("report", "open", "append")
    ]
