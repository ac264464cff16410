"""The compiled loops of convert and compare against the same in plain Python."""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcow2x._core import bulk

#: Buffers of zeros with a few other bytes: where they lie is what matters.
buffers = st.builds(
    lambda size, marks: bytes(1 if i in marks else 0 for i in range(size)),
    st.integers(0, 400),
    st.sets(st.integers(0, 399), max_size=6),
)


@given(buffers)
def test_zero_questions(data: bytes) -> None:
    first = next((i for i, byte in enumerate(data) if byte), None)
    assert bulk.is_zero(data) == (first is None)
    assert bulk.first_nonzero(data) == first
    assert bulk.first_difference(data, bytes(len(data))) == first


@pytest.mark.parametrize("at", [0, 1, 15, 16, 17, 4095, 4096, 4097, 9999])
def test_first_nonzero_over_pages(at: int) -> None:
    data = bytearray(10_000)
    data[at] = 1
    assert bulk.first_nonzero(data) == at
    assert bulk.first_difference(data, bytes(10_000)) == at


@given(buffers, st.integers(1, 50))
def test_zero_map(data: bytes, block: int) -> None:
    blocks = [data[at : at + block] for at in range(0, len(data), block)]
    assert bulk.zero_map(data, block) == bytes(not any(b) for b in blocks)


@given(buffers, st.integers(1, 20), st.integers(1, 100))
def test_data_runs_leave_out_long_zero_runs_only(data: bytes, block: int, min_zero: int) -> None:
    runs = bulk.data_runs(data, block, min_zero)
    left = bytearray(data)
    end = 0
    for start, length in runs:
        assert length > 0
        # What lies between two runs is a gap worth leaving out.
        assert start == 0 or start - end >= min_zero
        assert start % block == 0
        left[start : start + length] = bytes(length)
        end = start + length
    assert not any(left)
    # No run holds a gap that should have been left out.
    for start, length in runs:
        zero = 0
        for at in range(start, start + length, block):
            piece = data[at : min(at + block, start + length)]
            zero = 0 if any(piece) else zero + len(piece)
            assert zero < min_zero


def test_fill_zero_touches_its_range_only() -> None:
    data = bytearray(b"x" * 100)
    bulk.fill_zero(memoryview(data)[10:20])
    assert data == b"x" * 10 + bytes(10) + b"x" * 80


def test_compress_batch_packs_what_gets_smaller() -> None:
    noise = random.Random(1).randbytes(4096)
    text = (b"the same words again and again " * 200)[:4096]
    out = bytearray(4 * 4096)
    used, sizes = bulk.compress_batch(text + noise + text + bytes(4096), 4096, 0, 0, out)
    assert sizes[1] == 0
    assert sizes[0] == sizes[2]
    assert sum(sizes) == used
    packed = memoryview(out)[:used]
    at = 0
    for size, plain in ((sizes[0], text), (sizes[2], text), (sizes[3], bytes(4096))):
        assert zlib.decompress(packed[at : at + size], wbits=-12) == plain
        at += size


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="length"):
        bulk.first_difference(b"a", b"ab")
    with pytest.raises(ValueError, match="block"):
        bulk.data_runs(b"abc", 0, 1)
    with pytest.raises(ValueError, match="whole clusters"):
        bulk.compress_batch(bytes(1000), 512, 0, 0, bytearray(1024))
    with pytest.raises(ValueError, match="room"):
        bulk.compress_batch(bytes(1024), 512, 0, 0, bytearray(1023))
    with pytest.raises((TypeError, BufferError)):
        bulk.fill_zero(b"read-only")
