"""Compressed clusters: what is encoded decodes, here, in zlib and in QEMU; bad input is refused."""

import random
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

from qcow2x._core import codec
from qcow2x.errors import CorruptImage, UnsupportedFeature

DEFLATE, ZSTD = 0, 1
CLUSTER_SIZES = [512 << i for i in range(13)]
TEXT = Path(subprocess.__file__).read_bytes() + Path(random.__file__).read_bytes()


def samples(size: int) -> dict[str, bytes]:
    rng = random.Random(size)
    text = (TEXT * (size // len(TEXT) + 1))[:size]
    noise = rng.randbytes(size)
    # Repeats further back than 4 KiB tempt an encoder into a window too long for QEMU.
    far = (rng.randbytes(5000) * (size // 5000 + 1))[:size]
    # Repeats exactly 4096 and 4097 back sit on the edge of that window.
    edge = (rng.randbytes(4096) * (size // 4096 + 1))[:size]
    past = (rng.randbytes(4097) * (size // 4097 + 1))[:size]
    return {
        "zeros": bytes(size),
        "text": text,
        "noise": noise,
        "far": far,
        "edge": edge,
        "past": past,
        "half": noise[: size // 2] + bytes(size - size // 2),
    }


def levels(compression_type: int) -> list[int]:
    low, high = codec.levels(compression_type)
    return [0, *range(low, high + 1)]


def test_levels() -> None:
    assert codec.levels(DEFLATE) == (1, 9)
    assert codec.levels(ZSTD)[0] == 1
    assert codec.levels(ZSTD)[1] >= 19


@pytest.mark.parametrize("size", CLUSTER_SIZES)
def test_deflate_round_trip_within_a_4k_window(size: int) -> None:
    for level in levels(DEFLATE):
        for name, data in samples(size).items():
            packed = codec.encode(DEFLATE, data, level)
            if packed is None:
                assert name not in ("zeros", "half"), (name, level)
                continue
            assert len(packed) < size
            assert zlib.decompressobj(-12).decompress(packed) == data, (name, level)
            assert codec.decode(DEFLATE, packed, size) == data, (name, level)


@pytest.mark.parametrize("size", CLUSTER_SIZES)
def test_zstd_round_trip(size: int) -> None:
    some = levels(ZSTD) if size <= 65536 else [1, 3, 19]
    for level in some:
        for name, data in samples(size).items():
            packed = codec.encode(ZSTD, data, level)
            if packed is None:
                assert name not in ("zeros", "half"), (name, level)
                continue
            assert len(packed) < size
            # A normal frame: magic number first (RFC 8878, 3.1.1).
            assert packed[:4] == bytes.fromhex("28b52ffd")
            assert codec.decode(ZSTD, packed, size) == data, (name, level)


@pytest.mark.parametrize("compression_type", [DEFLATE, ZSTD])
def test_same_input_same_output(compression_type: int) -> None:
    """Contexts are reused; nothing of one cluster may show in the next."""
    for level in [0, *range(1, 10)]:
        first = {n: codec.encode(compression_type, d, level) for n, d in samples(65536).items()}
        for name in reversed(first):
            again = codec.encode(compression_type, samples(65536)[name], level)
            assert again == first[name], (name, level)


@pytest.mark.parametrize("compression_type", [DEFLATE, ZSTD])
@pytest.mark.parametrize("size", [512, 65536, 2 << 20])
def test_noise_is_incompressible(compression_type: int, size: int) -> None:
    noise = random.Random(1).randbytes(size)
    for level in range(10):
        assert codec.encode(compression_type, noise, level) is None


@pytest.mark.parametrize("compression_type", [DEFLATE, ZSTD])
def test_output_limit_is_kept(compression_type: int) -> None:
    data = samples(65536)["text"]
    for level in range(10):
        packed = codec.encode(compression_type, data, level)
        assert packed is not None
        assert codec.encode(compression_type, data, level, out_cap=len(packed) // 2) is None
        assert codec.encode(compression_type, data, level, out_cap=0) is None


@pytest.mark.parametrize("compression_type", [DEFLATE, ZSTD])
def test_bytes_after_the_stream_are_ignored(compression_type: int) -> None:
    data = samples(65536)["text"]
    packed = codec.encode(compression_type, data)
    assert packed is not None
    for tail in (b"\0", bytes(511), b"\xff" * 700, packed):
        assert codec.decode(compression_type, packed + tail, len(data)) == data


@pytest.mark.parametrize("compression_type", [DEFLATE, ZSTD])
@pytest.mark.parametrize("name", ["text", "zeros", "half"])
def test_short_output_is_refused(compression_type: int, name: str) -> None:
    data = samples(32768)[name]
    packed = codec.encode(compression_type, data)
    assert packed is not None
    with pytest.raises(CorruptImage):
        codec.decode(compression_type, packed, 65536)


def test_deflate_without_an_end_mark_is_accepted() -> None:
    """The output being full is what counts: some writers end on a sync flush."""
    data = samples(65536)["text"]
    encoder = zlib.compressobj(6, zlib.DEFLATED, -12)
    packed = encoder.compress(data) + encoder.flush(zlib.Z_SYNC_FLUSH)
    assert codec.decode(DEFLATE, packed, len(data)) == data
    longer = zlib.compressobj(6, zlib.DEFLATED, -12)
    packed = longer.compress(data + b"more than a cluster") + longer.flush()
    assert codec.decode(DEFLATE, packed, len(data)) == data


def test_deflate_with_a_long_window_is_read() -> None:
    data = samples(65536)["far"]
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = encoder.compress(data) + encoder.flush()
    assert codec.decode(DEFLATE, packed, len(data)) == data


def test_several_zstd_frames_make_a_cluster() -> None:
    data = samples(65536)["text"]
    parts = [codec.encode(ZSTD, data[i : i + 16384]) for i in range(0, 65536, 16384)]
    skippable = bytes.fromhex("502a4d1803000000") + b"abc"
    joined = skippable.join(p for p in parts if p is not None)
    assert codec.decode(ZSTD, joined + bytes(100), 65536) == data


def test_zstd_frame_larger_than_the_cluster_is_refused() -> None:
    packed = codec.encode(ZSTD, samples(65536)["text"])
    assert packed is not None
    with pytest.raises(CorruptImage):
        codec.decode(ZSTD, packed, 32768)


@pytest.mark.parametrize("compression_type", [DEFLATE, ZSTD])
def test_truncated_and_corrupted_input_is_refused_or_decodes_to_a_full_cluster(
    compression_type: int,
) -> None:
    data = samples(16384)["text"]
    packed = codec.encode(compression_type, data)
    assert packed is not None
    for cut in range(0, len(packed) - 8, 7):
        with pytest.raises(CorruptImage):
            codec.decode(compression_type, packed[:cut], len(data))
    rng = random.Random(5)
    for _ in range(2000):
        broken = bytearray(packed)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            assert len(codec.decode(compression_type, broken, len(data))) == len(data)
        except CorruptImage:
            pass
    for n in range(64):
        try:
            codec.decode(compression_type, rng.randbytes(n), 512)
        except CorruptImage:
            pass


def test_a_huge_zstd_window_costs_no_memory() -> None:
    """A frame may claim a window of gigabytes; only the cluster itself is ever held."""
    # Magic; no content size, no checksum; window descriptor for 2 GiB; one RLE block of 512 bytes.
    header = 512 << 3 | 1 << 1 | 1
    frame = bytes.fromhex("28b52ffd00") + bytes([21 << 3]) + header.to_bytes(3, "little") + b"z"
    script = (
        "import resource, sys\n"
        "from qcow2x._core import codec\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "assert codec.decode(1, bytes.fromhex(sys.argv[1]), 512) == b'z' * 512\n"
    )
    subprocess.run([sys.executable, "-c", script, frame.hex()], check=True)


def test_unknown_type_and_level_out_of_range() -> None:
    with pytest.raises(UnsupportedFeature):
        codec.decode(2, b"", 512)
    with pytest.raises(UnsupportedFeature):
        codec.encode(2, bytes(512))
    for compression_type in (DEFLATE, ZSTD):
        for level in (-1, codec.levels(compression_type)[1] + 1):
            with pytest.raises(ValueError, match="level"):
                codec.encode(compression_type, bytes(512), level)


def test_many_threads() -> None:
    wrong: list[str] = []
    data = samples(65536)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            kind, level = rng.choice((DEFLATE, ZSTD)), rng.randrange(10)
            name = rng.choice(["text", "zeros", "half", "far"])
            packed = codec.encode(kind, data[name], level)
            if packed is not None and codec.decode(kind, packed, 65536) != data[name]:
                wrong.append(f"{kind} {level} {name}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_streams_of_qemu_decode_and_ours_are_read_by_qemu(tmp_path: Path, kind: str) -> None:
    """Swap the stream of a cluster that QEMU compressed for ours; QEMU reads the same bytes."""
    compression_type = {"zlib": DEFLATE, "zstd": ZSTD}[kind]
    data = samples(65536)["text"]
    raw, image = tmp_path / "raw", tmp_path / "image.qcow2"
    raw.write_bytes(data)
    subprocess.run(
        ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", raw, image],
        check=True,
    )
    content = bytearray(image.read_bytes())
    l1_offset = int.from_bytes(content[40:48], "big")
    l2_offset = int.from_bytes(content[l1_offset : l1_offset + 8], "big") & 0x00FFFFFFFFFFFE00
    entry = int.from_bytes(content[l2_offset : l2_offset + 8], "big")
    assert entry >> 62 & 1
    host_bits = 62 - (16 - 8)
    host = entry & ((1 << host_bits) - 1)
    sectors = (entry >> host_bits & 0xFF) + 1
    room = sectors * 512 - host % 512
    assert codec.decode(compression_type, content[host : host + room], 65536) == data
    for level in [0, *range(1, 10)]:
        packed = codec.encode(compression_type, data, level)
        assert packed is not None
        # Ours may be longer: say so in the entry, and let the file go on as far.
        sectors = (host % 512 + len(packed) + 511) // 512
        entry = 1 << 62 | (sectors - 1) << host_bits | host
        content[l2_offset : l2_offset + 8] = entry.to_bytes(8, "big")
        content[host:] = packed + bytes(65536)
        image.write_bytes(content)
        subprocess.run(["qemu-img", "compare", "-F", "raw", image, raw], check=True)
