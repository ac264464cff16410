"""Requests for many compressed clusters, which several CPUs decode."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
from support.packed import stream_of

import qcow2x
from qcow2x._core import crew

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
SIZE = 4 * MIB


def hardly_compressible(nbytes: int, seed: int = 0) -> bytes:
    """Six bits to a byte, so that streams are long enough for their work to be shared out."""
    return bytes(byte & 0x3F for byte in random.Random(seed).randbytes(nbytes))


@pytest.fixture(scope="module", params=["zlib", "zstd"])
def packed(request, tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("packed") / "disk.qcow2"
    content = hardly_compressible(SIZE)
    qcow2x.create(path, SIZE, compression_type=request.param)
    with qcow2x.open(path, "r+", cache="unsafe") as image:
        for at in range(0, SIZE, CLUSTER):
            image.pwrite_compressed(content[at : at + CLUSTER], at)
    assert path.stat().st_size < SIZE
    return path, content


@pytest.mark.parametrize("alone", [False, True])
def test_large_requests(packed: tuple[Path, bytes], alone: bool) -> None:
    path, content = packed
    rng = random.Random(3)
    if alone:
        crew.share_out_alone()
    try:
        with qcow2x.open(path) as image:
            assert image.pread(SIZE, 0) == content
            for _ in range(60):
                at = rng.randrange(SIZE)
                length = rng.randrange(1, SIZE - at + 1)
                assert image.pread(length, at) == content[at : at + length]
    finally:
        if alone:
            crew.share_out_again()


def test_beside_what_is_not_compressed(packed: tuple[Path, bytes], tmp_path: Path) -> None:
    path, content = packed
    mixed = tmp_path / "mixed.qcow2"
    mixed.write_bytes(path.read_bytes())
    expected = bytearray(content)
    with qcow2x.open(mixed, "r+") as image:
        for at in (300 * KIB, 1500 * KIB, 1600 * KIB, 3 * MIB):
            image.pwrite(b"x" * 5000, at)
            expected[at : at + 5000] = b"x" * 5000
        image.write_zeroes(2 * MIB, 3 * CLUSTER)
        expected[2 * MIB : 2 * MIB + 3 * CLUSTER] = bytes(3 * CLUSTER)
        for at in range(0, SIZE, 999 * KIB):
            assert image.pread(SIZE - at, at) == expected[at:]


@pytest.mark.not_for_qemu("damaged")
@pytest.mark.parametrize("broken", [0, 17, 63])
def test_one_that_does_not_decode_fails_the_request(
    packed: tuple[Path, bytes], tmp_path: Path, broken: int
) -> None:
    path, content = packed
    damaged = tmp_path / "damaged.qcow2"
    raw = bytearray(path.read_bytes())
    offset, nbytes = stream_of(path, broken)
    raw[offset : offset + nbytes // 2] = b"\xff" * (nbytes // 2)
    damaged.write_bytes(raw)
    with qcow2x.open(damaged) as image:
        for _ in range(3):
            with pytest.raises(qcow2x.CorruptImage) as failure:
                image.pread(SIZE, 0)
            assert str(damaged) in str(failure.value)
            assert f"{offset:#x}" in str(failure.value) or str(offset) in str(failure.value)
        # What lies beside it can be read.
        after = (broken + 1) * CLUSTER
        assert image.pread(SIZE - after, after) == content[after:]
        assert image.pread(broken * CLUSTER, 0) == content[: broken * CLUSTER]


def test_many_readers_at_once(packed: tuple[Path, bytes]) -> None:
    path, content = packed
    failures: list[BaseException] = []

    def read(number: int) -> None:
        rng = random.Random(number)
        try:
            for _ in range(15):
                at = rng.randrange(0, SIZE - MIB)
                assert image.pread(MIB, at) == content[at : at + MIB]
        except BaseException as exc:
            failures.append(exc)

    with qcow2x.open(path) as image:
        threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_after_a_fork(packed: tuple[Path, bytes]) -> None:
    path, content = packed
    with qcow2x.open(path) as image:
        assert image.pread(SIZE, 0) == content
        child = os.fork()
        if child == 0:
            with qcow2x.open(path) as own:
                os._exit(0 if own.pread(SIZE, 0) == content else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert image.pread(SIZE, 0) == content
