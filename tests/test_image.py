"""The surface of an image, as its users meet it: arguments, closing, files, chains, looking."""

import array
import gc
import io
import json
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.qemu import check_clean, compare_bytes, qemu_img, qemu_info, qemu_io
from support.recorder import Recorder
from support.stamps import stamped

import qcow2x
from qcow2x.errors import CorruptImage, FormatError, ReferenceDenied, UnsupportedFeature

KiB = 1 << 10
MiB = 1 << 20
SIZE = MiB + 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, SIZE, cluster_size=4096)
    return path


# ---- Arguments ----


@pytest.mark.parametrize("offset", [-1, -(1 << 70), 1 << 63, 1 << 64, 1 << 200])
def test_offsets_out_of_range(path: Path, offset: int) -> None:
    with qcow2x.open(path, "r+") as image:
        calls: list[Callable[[], object]] = [
            lambda: image.pread(1, offset),
            lambda: image.preadinto(bytearray(1), offset),
            lambda: image.preadv_many([(bytearray(1), offset)]),
            lambda: image.pwrite(b"x", offset),
            lambda: image.pwritev_many([(b"x", offset)]),
            lambda: image.pwrite_compressed(bytes(4096), offset),
            lambda: image.write_zeroes(offset, 1),
            lambda: image.discard(offset, 1),
            lambda: list(image.extents(offset, 1)),
        ]
        for call in calls:
            with pytest.raises(ValueError):
                call()


@pytest.mark.parametrize("length", [-1, 1 << 64, 1 << 200])
def test_lengths_out_of_range(path: Path, length: int) -> None:
    with qcow2x.open(path, "r+") as image:
        for call in (
            lambda: image.pread(length, 0),
            lambda: image.write_zeroes(0, length),
            lambda: image.discard(0, length),
            lambda: list(image.extents(0, length)),
        ):
            with pytest.raises(ValueError):
                call()


def test_writes_past_the_end_change_nothing(path: Path) -> None:
    with qcow2x.open(path, "r+") as image:
        for call in (
            lambda: image.pwrite(b"12", SIZE - 1),
            lambda: image.pwrite(b"1", SIZE),
            lambda: image.write_zeroes(SIZE - 1, 2),
            lambda: image.discard(0, SIZE + 1),
            lambda: list(image.extents(0, SIZE + 1)),
        ):
            with pytest.raises(ValueError, match="disk"):
                call()
        assert image.pwrite(b"", SIZE) == 0
        image.discard(SIZE, 0)
        assert not any(e.data for e in image.extents())
        # Reads stop at the end instead.
        assert image.pread(100, SIZE - 10) == bytes(10)
        assert image.pread(100, SIZE) == b""
        assert image.pread(100, 1 << 62) == b""
        assert image.preadinto(bytearray(10), SIZE + 5) == 0


def test_a_huge_read_takes_no_more_than_the_disk(path: Path) -> None:
    with qcow2x.open(path) as image:
        assert image.pread(1 << 62, SIZE - 3) == bytes(3)


@pytest.mark.parametrize("wrong", ["text", None, 3, 1.5, object()])
def test_wrong_types(path: Path, wrong: Any) -> None:
    with qcow2x.open(path, "r+") as image:
        with pytest.raises(TypeError):
            image.pwrite(wrong, 0)
        with pytest.raises(TypeError):
            image.preadinto(wrong, 0)
        with pytest.raises(TypeError):
            image.pwrite_compressed(wrong, 0)
        if not isinstance(wrong, (int, float)):
            with pytest.raises(TypeError):
                image.pread(wrong, 0)
            with pytest.raises(TypeError):
                image.pread(1, wrong)


def test_a_read_only_buffer_cannot_be_filled(path: Path) -> None:
    with qcow2x.open(path) as image:
        for buffer in (b"1234", memoryview(bytearray(4)).toreadonly()):
            with pytest.raises((TypeError, BufferError)):
                image.preadinto(buffer, 0)


def test_any_buffer_will_do(path: Path) -> None:
    with qcow2x.open(path, "r+") as image:
        numbers = array.array("Q", range(1000))
        assert image.pwrite(numbers, 100) == 8000
        back = array.array("Q", bytes(8000))
        assert image.preadinto(back, 100) == 8000
        assert back == numbers
        with mmap.mmap(-1, 8192) as memory:
            assert image.preadinto(memory, 0) == 8192
            assert memory[100:8100] == numbers.tobytes()
            assert image.pwrite(memory, 8192) == 8192
        view = memoryview(bytearray(64))
        assert image.preadinto(view[16:32], 100) == 16
        assert view[16:32] == numbers.tobytes()[:16]
        assert not any(view[:16]) and not any(view[32:])
        # A strided view is no buffer of bytes in a row.
        with pytest.raises((BufferError, TypeError)):
            image.pwrite(memoryview(bytes(64))[::2], 0)


def test_a_buffer_is_not_held_afterwards(path: Path) -> None:
    with qcow2x.open(path, "r+") as image:
        data = bytearray(b"x" * 100)
        image.pwrite(data, 0)
        image.preadinto(data, 0)
        with pytest.raises(ValueError):
            image.pwrite(data, SIZE)
        data.extend(b"more")


def test_preadv_many(path: Path) -> None:
    with qcow2x.open(path, "r+") as image:
        image.pwrite(stamped(0, 64 * KiB, 1), 0)
        requests = [(bytearray(n * 700), n * 5000) for n in range(8)]
        requests.append((bytearray(100), SIZE - 60))
        assert image.preadv_many(requests) == [len(b) for b, _ in requests[:-1]] + [60]
        for buffer, offset in requests:
            assert bytes(buffer)[: SIZE - offset] == image.pread(len(buffer), offset)
        assert image.preadv_many([]) == []


def test_compressed_writes_take_whole_clusters(path: Path) -> None:
    with qcow2x.open(path, "r+") as image:
        for data, offset in ((bytes(4096), 512), (bytes(100), 0), (bytes(5000), 4096)):
            with pytest.raises(ValueError, match="cluster"):
                image.pwrite_compressed(data, offset)
        assert image.pwrite_compressed(b"e" * 512, MiB) == 512
        for level in (1, 9):
            assert image.pwrite_compressed(bytes(8192), 0, level=level) == 8192
        assert image.pread(600, MiB) == b"e" * 512


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "w"},
        {"mode": "rb"},
        {"cache": "fast"},
        {"references": "maybe"},
        {"l2_cache_size": 0},
        {"l2_cache_size": -1},
        {"l2_cache_size": 1 << 50},
        {"key": b"secret"},
    ],
    ids=str,
)
def test_open_refuses_bad_arguments(tmp_path: Path, path: Path, arguments: dict[str, Any]) -> None:
    top = tmp_path / "top.qcow2"
    qcow2x.create(top, SIZE, backing_file=path, backing_format="qcow2")
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError):
        qcow2x.open(top, **({"references": "follow"} | arguments))
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize("source", [True, 1.5, None, object(), ""])
def test_open_refuses_what_is_no_source(source: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        qcow2x.open(source)


def test_open_reports_what_the_system_says(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        qcow2x.open(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        qcow2x.open(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="empty"):
        qcow2x.open(tmp_path / "empty")


# ---- Closing ----


def test_everything_raises_after_close(path: Path) -> None:
    image = qcow2x.open(path, "r+")
    file = image.as_file()
    assert not image.closed
    image.close()
    image.close()
    assert image.closed
    for call in (
        lambda: image.pread(1, 0),
        lambda: image.preadinto(bytearray(1), 0),
        lambda: image.pwrite(b"x", 0),
        lambda: image.pwrite_compressed(bytes(4096), 0),
        lambda: image.write_zeroes(0, 4096),
        lambda: image.discard(0, 4096),
        lambda: image.resize(4 * MiB),
        lambda: list(image.extents()),
        image.check,
        image.flush,
        lambda: file.read(1),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
    assert "closed" in repr(image)


def test_close_makes_everything_durable(tmp_path: Path, path: Path) -> None:
    recorder = Recorder(path.read_bytes())
    with qcow2x.open(recorder, "r+") as image:
        image.pwrite(b"q" * 100_000, 5)
    assert recorder.log[-1] == ("flush",)
    out = tmp_path / "out.qcow2"
    out.write_bytes(recorder.data)
    check_clean(out)


def test_an_image_is_closed_by_the_with_block_even_after_an_error(path: Path) -> None:
    with pytest.raises(KeyError), qcow2x.open(path, "r+") as image:
        image.pwrite(b"kept", 0)
        raise KeyError
    assert image.closed
    with qcow2x.open(path) as again:
        assert again.pread(4, 0) == b"kept"


def test_a_forgotten_image_warns_and_keeps_the_data(path: Path) -> None:
    image = qcow2x.open(path, "r+")
    image.pwrite(b"kept", 0)
    with pytest.warns(ResourceWarning, match="unclosed"):
        del image
        gc.collect()
    with qcow2x.open(path) as again:
        assert again.pread(4, 0) == b"kept"
    check_clean(path)


def test_opening_and_closing_leaves_no_descriptor(tmp_path: Path, path: Path) -> None:
    top = tmp_path / "top.qcow2"
    qcow2x.create(top, SIZE, backing_file=path, backing_format="qcow2")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with qcow2x.open(top, "r+", references="follow") as image:
            image.pwrite(b"x", 0)
        with pytest.raises(ReferenceDenied):
            qcow2x.open(top)
    # A closed file keeps its number until the object goes, so that no late call meets another file.
    del image
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- Read-only ----


def test_a_read_only_image_is_never_written(tmp_path: Path) -> None:
    """Not even where a writer would: autoclear bits of features we do not keep up."""
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, SIZE)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(stamped(0, 200_000, 1), 0)
    data = bytearray(path.read_bytes())
    data[95] |= 0x80  # an unknown autoclear bit
    path.write_bytes(data)
    path.chmod(0o444)
    with qcow2x.open(path) as image:
        assert not image.writable
        for call in (
            lambda: image.pwrite(b"x", 0),
            lambda: image.pwrite_compressed(bytes(65536), 0),
            lambda: image.write_zeroes(0, 65536),
            lambda: image.discard(0, 65536),
            lambda: image.resize(2 * MiB),
            lambda: image.check(repair="leaks"),
        ):
            with pytest.raises(PermissionError):
                call()
        image.flush()
        assert image.pread(200_000, 0) == stamped(0, 200_000, 1)
        image.check()
        list(image.extents())
    assert path.read_bytes() == data


def test_the_first_writer_clears_autoclear_bits(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[88:96] = b"\x80\0\0\0\0\0\0\x04"
    path.write_bytes(data)
    with qcow2x.open(path, "r+"):
        pass
    assert path.read_bytes()[88:96] == bytes(8)


def test_a_descriptor_open_for_reading_is_not_written(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with qcow2x.open(fd) as image:
            assert image.pread(1, 0) == b"\0"
        with pytest.raises(PermissionError):
            qcow2x.open(fd, "r+")
    finally:
        os.close(fd)


def test_a_descriptor_stays_the_callers(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        with qcow2x.open(fd, "r+") as image:
            image.pwrite(b"by descriptor", 7)
        assert os.pread(fd, 4, 0) == b"QFI\xfb"
    finally:
        os.close(fd)
    with qcow2x.open(path) as image:
        assert image.pread(13, 7) == b"by descriptor"


# ---- As a file ----


def test_as_file_is_a_binary_file(path: Path) -> None:
    with qcow2x.open(path, "r+") as image:
        with image.as_file() as file:
            assert isinstance(file, io.RawIOBase)
            assert file.readable() and file.writable() and file.seekable()
            assert file.write(b"hello world") == 11
            assert file.tell() == 11
            assert file.seek(-5, io.SEEK_CUR) == 6
            assert file.read(5) == b"world"
            assert file.seek(-3, io.SEEK_END) == SIZE - 3
            assert file.read(10) == bytes(3)
            assert file.read(10) == b""
            assert file.write(b"") == 0
            with pytest.raises(OSError):
                file.write(b"past the end")
            file.seek(SIZE - 2)
            assert file.write(b"abcdef") == 2
            file.seek(0)
            everything = file.readall()
            assert len(everything) == SIZE
            assert everything[-2:] == b"ab"
            for bad in (lambda: file.seek(-1), lambda: file.seek(0, 9)):
                with pytest.raises(ValueError):
                    bad()
            file.flush()
        with pytest.raises(ValueError):
            file.read(1)
        # Closing the file left the image open.
        assert image.pread(5, 0) == b"hello"


def test_as_file_buffered(path: Path) -> None:
    data = stamped(0, SIZE, 4)
    with qcow2x.open(path, "r+") as image:
        writer = io.BufferedRandom(image.as_file())  # type: ignore[arg-type]
        for at in range(0, SIZE, 3333):
            writer.seek(at)
            writer.write(data[at : at + 3333])
        writer.flush()
        writer.detach()
        reader = io.BufferedReader(image.as_file(), 8192)
        pieces = []
        while piece := reader.read(777):
            pieces.append(piece)
        assert b"".join(pieces) == data
        with pytest.raises(io.UnsupportedOperation):
            reader.write(b"x")  # type: ignore[attr-defined]
    compare_bytes(path, data)
    with qcow2x.open(path) as image:
        file = image.as_file()
        assert not file.writable()
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")


# ---- Looking ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"cluster_size": 16384, "extended_l2": True, "compression_type": "zstd"},
        {"cluster_size": 512, "refcount_bits": 1, "lazy_refcounts": True},
    ],
    ids=str,
)
def test_info_agrees_with_qemu(tmp_path: Path, options: dict[str, Any]) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(SIZE))
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, SIZE, backing_file="base.raw", backing_format="raw", **options)
    told = qemu_info(path)
    special = told["format-specific"]["data"]
    with qcow2x.open(path, references="follow") as image:
        info = image.info()
    assert info.format == told["format"]
    assert info.virtual_size == told["virtual-size"]
    assert info.cluster_size == told["cluster-size"]
    assert info.actual_size == told["actual-size"]
    assert info.dirty == told["dirty-flag"]
    assert info.backing_filename == told["backing-filename"]
    assert info.full_backing_filename == told["full-backing-filename"]
    assert info.backing_format == told["backing-filename-format"]
    assert info.compat == special["compat"]
    assert info.compression_type == special["compression-type"]
    assert info.refcount_bits == special["refcount-bits"]
    assert info.lazy_refcounts == special.get("lazy-refcounts", False)
    assert info.corrupt == special.get("corrupt", False)
    assert info.extended_l2 == special.get("extended-l2", False)


@pytest.mark.parametrize("l2_cache_size", [1, 300_000, 1 << 20])
def test_metadata_memory_stays_within_its_bound(tmp_path: Path, l2_cache_size: int) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 256 * MiB, cluster_size=512)
    with qcow2x.open(path, "r+", cache="unsafe", l2_cache_size=l2_cache_size) as image:
        for at in range(0, 256 * MiB, 32 * KiB):
            image.pwrite(b"x", at)
        stats = image.stats()
        # A floor of 64 slices, and an eighth of that for condensed ones, keeps many threads at once from
        # waiting for each other.
        assert stats.l2_cache_limit <= max(l2_cache_size, 72 * 512)
        assert stats.l2_cache_bytes <= stats.l2_cache_limit
        assert stats.refcount_cache_bytes <= stats.refcount_cache_limit
        assert stats.l2_evictions > 0
        assert all(image.pread(1, at) == b"x" for at in range(0, 256 * MiB, 3200 * KiB))
    check_clean(path)


def test_many_calls_take_no_memory(path: Path) -> None:
    """A leak of a buffer or an object in any verb shows after some thousand calls."""

    def rounds(n: int) -> None:
        for turn in range(n):
            at = turn * 4096 % MiB
            image.pwrite(data, at)
            image.pread(4096, at)
            image.preadinto(buffer, at)
            image.pwrite_compressed(data, at)
            image.discard(at, 4096)
            image.write_zeroes(at, 4000, unmap=True)
            list(image.extents(at, 4096))
            image.stats()
            with pytest.raises(ValueError):
                image.pread(1, -1)
            with pytest.raises(ValueError):
                image.pwrite(data, SIZE)
            if turn % 50 == 0:
                image.flush()

    def now() -> int:
        gc.collect()
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    data, buffer = b"\x37" * 4096, bytearray(4096)
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        rounds(600)
        before = now()
        rounds(3000)
        assert now() - before < 4 * MiB


def test_opening_a_terabyte_reads_header_and_l1_only(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 1 << 40)

    class Counting(Recorder):
        taken = 0

        def pread(self, length: int, offset: int) -> bytes:
            self.taken += length
            return super().pread(length, offset)

    storage = Counting(path.read_bytes())
    with qcow2x.open(storage) as image:
        l1 = (1 << 40) // (65536 * 8192) * 8
        assert storage.taken <= 2 * 65536 + l1
        assert image.pread(4096, 1 << 39) == bytes(4096)


# ---- What an image names ----


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """top.qcow2 -> middle.qcow2 -> base.raw"""
    (tmp_path / "base.raw").write_bytes(stamped(0, SIZE, 1))
    for name, under, fmt in (
        ("middle.qcow2", "base.raw", "raw"),
        ("top.qcow2", "middle.qcow2", "qcow2"),
    ):
        qcow2x.create(tmp_path / name, SIZE, backing_file=under, backing_format=fmt)
    return tmp_path / "top.qcow2"


def test_references_are_denied_unless_allowed(chain: Path) -> None:
    with pytest.raises(ReferenceDenied, match=r"middle\.qcow2") as info:
        qcow2x.open(chain)
    assert isinstance(info.value, PermissionError)
    assert info.value.path == str(chain)
    with qcow2x.open(chain, references="follow") as image:
        assert image.pread(SIZE, 0) == stamped(0, SIZE, 1)
        assert [layer.name for layer in image.backing_chain] == [
            str(chain.parent / name) for name in ("top.qcow2", "middle.qcow2", "base.raw")
        ]


def test_a_callable_decides(chain: Path) -> None:
    asked: list[qcow2x.Reference] = []

    def policy(reference: qcow2x.Reference) -> Any:
        asked.append(reference)
        return reference.path if reference.format == "qcow2" else None

    with pytest.raises(ReferenceDenied, match=r"base\.raw"):
        qcow2x.open(chain, references=policy)
    assert [(r.kind, r.name, r.format) for r in asked] == [
        ("backing", "middle.qcow2", "qcow2"),
        ("backing", "base.raw", "raw"),
    ]
    assert asked[0].referrer == str(chain)
    assert asked[0].path == str(chain.parent / "middle.qcow2")

    # It may hand out something else entirely.
    other = Recorder(stamped(0, SIZE, 2))
    with qcow2x.open(chain, references=lambda r: other if r.format == "raw" else r.path) as image:
        assert image.pread(SIZE, 0) == stamped(0, SIZE, 2)

    def broken(reference: qcow2x.Reference) -> Any:
        raise LookupError(reference.name)

    with pytest.raises(LookupError, match=r"middle\.qcow2"):
        qcow2x.open(chain, references=broken)


def test_backing_given_outright(chain: Path) -> None:
    other = chain.parent / "other.qcow2"
    qcow2x.create(other, SIZE)
    with qcow2x.open(other, "r+") as image:
        image.pwrite(stamped(0, SIZE, 3), 0)
    with qcow2x.open(chain, backing=other) as image:
        assert image.pread(SIZE, 0) == stamped(0, SIZE, 3)
    with qcow2x.open(other) as below:
        with qcow2x.open(chain, backing=below) as image:
            assert image.backing is below
            assert image.pread(SIZE, 0) == stamped(0, SIZE, 3)
        assert not below.closed
    with pytest.raises(ValueError, match="no backing"):
        qcow2x.open(other, backing=chain)


def test_backing_withheld(chain: Path) -> None:
    """Without its backing file an image reads what it has, and does not make up the rest."""
    with qcow2x.open(chain, "r+", backing=False) as image:
        image.pwrite(b"own" * 65536, 0)
        assert image.pread(3, 0) == b"own"
        with pytest.raises(ReferenceDenied):
            image.pread(1, 512 * KiB)
        # A partial write would need the old bytes around it.
        with pytest.raises(ReferenceDenied):
            image.pwrite(b"x", 600 * KiB)
    check_clean(chain)
    with qcow2x.open(chain, references="follow") as image:
        assert image.pread(100, 600 * KiB) == stamped(600 * KiB, 100, 1)


@pytest.mark.not_for_qemu("a chain without end")
def test_a_chain_that_bites_its_tail(tmp_path: Path) -> None:
    first, second = tmp_path / "first.qcow2", tmp_path / "second.qcow2"
    qcow2x.create(first, SIZE, backing_file="second.qcow2", backing_format="qcow2")
    qcow2x.create(second, SIZE, backing_file="first.qcow2", backing_format="qcow2")
    for start in (first, second):
        with pytest.raises(CorruptImage, match="own backing chain"):
            qcow2x.open(start, references="follow")
    linked = tmp_path / "linked.qcow2"
    os.link(first, linked)
    with pytest.raises(CorruptImage):
        qcow2x.open(linked, references="follow")


def test_a_long_chain(tmp_path: Path) -> None:
    """Deep, but opened without recursion; each layer shows through."""
    depth = 120
    name = "layer0.raw"
    fmt = "raw"
    (tmp_path / name).write_bytes(stamped(0, 64 * KiB, 0))
    for n in range(1, depth):
        path = tmp_path / f"layer{n}.qcow2"
        qcow2x.create(path, 64 * KiB, cluster_size=512, backing_file=name, backing_format=fmt)
        name, fmt = path.name, "qcow2"
        with qcow2x.open(path, "r+", backing=False) as image:
            image.pwrite(stamped(n * 512, 512, n), n * 512)
    with qcow2x.open(path, references="follow") as image:
        data = image.pread(64 * KiB, 0)
        assert len(image.backing_chain) == depth
        assert {extent.depth for extent in image.extents()} == set(range(depth))
    for n in range(128):
        expected = stamped(n * 512, 512, n if 0 < n < depth else 0)
        assert data[n * 512 : (n + 1) * 512] == expected, n


@pytest.mark.not_for_qemu("a format that only QEMU guesses")
def test_a_format_is_never_guessed(tmp_path: Path) -> None:
    """QEMU 6.0 and older wrote overlays that name no format."""
    base = tmp_path / "base.qcow2"
    qcow2x.create(base, SIZE)
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    data = bytearray(top.read_bytes())
    at = data.index(b"\xe2\x79\x2a\xca")
    data[at : at + 4] = b"\x12\x34\x56\x78"
    top.write_bytes(data)
    with pytest.raises(FormatError, match="format"):
        qcow2x.open(top, references="follow")
    with qcow2x.open(base) as below, qcow2x.open(top, backing=below) as image:
        assert image.pread(10, 0) == bytes(10)


def test_an_unknown_backing_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "base.vmdk").write_bytes(bytes(512))
    top = tmp_path / "top.qcow2"
    qcow2x.create(top, SIZE, backing_file="base.vmdk", backing_format="vmdk")
    with pytest.raises(UnsupportedFeature, match="vmdk"):
        qcow2x.open(top, references="follow")


@pytest.mark.parametrize("name", ["nbd:localhost:10809", "json:{}", "nbd://host/x", "ssh://h/p"])
def test_protocols_are_not_followed(tmp_path: Path, name: str) -> None:
    top = tmp_path / "top.qcow2"
    qcow2x.create(top, SIZE, backing_file=name, backing_format="raw")
    with pytest.raises(ReferenceDenied):
        qcow2x.open(top, references="follow")
    seen = []
    with pytest.raises(ReferenceDenied):
        qcow2x.open(top, references=lambda r: seen.append(r))
    assert seen[0].path is None and seen[0].name == name


# ---- Resizing ----


def test_resize_says_no(path: Path) -> None:
    with qcow2x.open(path, "r+") as image:
        for size, options in (
            (-512, {}),
            (1000, {"shrink": True}),
            (512, {}),
            (2 * MiB, {"preallocation": "some"}),
            (512, {"shrink": True, "preallocation": "full"}),
            (1 << 62, {}),
            (1 << 64, {}),
        ):
            with pytest.raises(ValueError):
                image.resize(size, **options)  # type: ignore[arg-type]
        assert image.size == SIZE
    check_clean(path)


def test_the_old_bytes_are_gone_after_shrinking_and_growing(path: Path) -> None:
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"s" * SIZE, 0)
        image.resize(300 * KiB + 512, shrink=True)
        image.resize(SIZE)
        assert image.pread(SIZE, 0) == b"s" * (300 * KiB + 512) + bytes(SIZE - 300 * KiB - 512)
    check_clean(path)
    compare_bytes(path, b"s" * (300 * KiB + 512) + bytes(SIZE - 300 * KiB - 512))


# ---- Python objects as storage ----


class Minimal:
    """No more than what the protocol asks for, and stingy: a few bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    def size(self) -> int:
        return len(self.data)

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + min(length, 1000)])

    def pwrite(self, buffer: Any, offset: int) -> int:
        data = bytes(buffer)[:3000]
        self.data.extend(bytes(max(0, offset + len(data) - len(self.data))))
        self.data[offset : offset + len(data)] = data
        return len(data)

    def flush(self) -> None:
        pass

    def truncate(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))


def test_an_object_with_the_least_is_enough(tmp_path: Path, path: Path) -> None:
    storage = Minimal(path.read_bytes())
    with qcow2x.open(storage, "r+") as image:
        image.pwrite(stamped(0, 300_000, 1), 0)
        image.pwrite_compressed(stamped(512 * KiB, 8192, 2), 512 * KiB)
        image.discard(0, 8192)
    out = tmp_path / "out.qcow2"
    out.write_bytes(storage.data)
    check_clean(out)
    expected = bytearray(SIZE)
    expected[8192:300_000] = stamped(8192, 300_000 - 8192, 1)
    expected[512 * KiB : 520 * KiB] = stamped(512 * KiB, 8192, 2)
    compare_bytes(out, expected)


def test_errors_of_an_object_come_out_as_they_are(path: Path) -> None:
    class Failing(Recorder):
        def pread(self, length: int, offset: int) -> bytes:
            if self.armed:
                raise LookupError("gone")
            return super().pread(length, offset)

        armed = False

    storage = Failing(path.read_bytes())
    with qcow2x.open(storage, "r+") as image:
        image.pwrite(b"x" * 100, 0)
        storage.armed = True
        with pytest.raises(LookupError, match="gone"):
            image.pread(100, 0)
        storage.armed = False
        assert image.pread(100, 0) == b"x" * 100


def test_objects_below_objects(path: Path) -> None:
    """A Python object as the backing file of an image on a Python object."""
    base = Recorder(stamped(0, SIZE, 8))
    top = Recorder()
    qcow2x.create(top, SIZE, backing_file="x.raw", backing_format="raw")
    with qcow2x.open(top, "r+", references=lambda r: base) as image:
        image.pwrite(b"top", 1000)
        assert image.pread(3, 1000) == b"top"
        assert image.pread(600, 1003) == stamped(1003, 600, 8)
    assert not [entry for entry in base.log if entry[0] != "flush"]


# ---- The interpreter's side ----


def test_import_is_lazy() -> None:
    code = "import sys, qcow2x; print([m for m in sys.modules if m.startswith('qcow2x')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(json.loads(out.stdout.replace("'", '"'))) == ["qcow2x", "qcow2x._version"]


def test_writes_by_qemu_between_opens_are_seen(path: Path) -> None:
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"first", 0)
    qemu_io(path, "write -P 0x41 0 512")
    with qcow2x.open(path) as image:
        assert image.pread(5, 0) == b"AAAAA"
