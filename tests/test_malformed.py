"""Damaged and hostile images: a typed error at open or at the access, in bounded memory; never a
crash, a hang, or bytes that are not the disk's.

All of it happens in a child process (support/victim.py), which a fault would kill instead of us.
"""

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.qemu import check_clean
from support.stamps import stamped
from support.victim import Victim

import qcow2x

pytestmark = pytest.mark.not_for_qemu("damaged images")

KiB = 1 << 10
CLUSTER = 4096
SIZE = 256 * KiB + 512
#: Random damages per kind of image; more with the environment variable.
FLIPS = int(os.environ.get("QCOW2X_TEST_FLIPS", "1000"))


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    child = Victim()
    yield child
    child.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("malformed")


def make(path: Path, **options: Any) -> Path:
    """A disk with plain, compressed, zero and unallocated clusters."""
    options = {"cluster_size": CLUSTER} | options
    qcow2x.create(path, SIZE, **options)
    with qcow2x.open(path, "r+", references="follow") as image:
        cluster = image.cluster_size
        image.pwrite(stamped(0, 64 * KiB, 1), 0)
        compressed = -(-64 * KiB // cluster) * cluster
        image.pwrite_compressed(stamped(compressed, 2 * cluster, 2), compressed)
        image.write_zeroes(192 * KiB, 32 * KiB)
        image.pwrite(b"end", SIZE - 3)
    check_clean(path)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return make(folder / "plain.qcow2")


@pytest.fixture(scope="module")
def extended(folder: Path) -> Path:
    return make(folder / "extended.qcow2", cluster_size=16384, extended_l2=True)


@pytest.fixture(scope="module")
def overlay(folder: Path) -> Path:
    (folder / "base.raw").write_bytes(stamped(0, SIZE, 7))
    return make(folder / "overlay.qcow2", backing_file="base.raw", backing_format="raw")


class Tables:
    """Where things are in an image file."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        self.cluster_bits = self.be32(20)
        self.cluster = 1 << self.cluster_bits
        self.l1 = self.be64(40)
        self.l1_size = self.be32(36)
        self.rt = self.be64(48)
        self.extended = bool(self.be64(72) & 16)
        self.l2 = self.be64(self.l1) & 0x00FFFFFFFFFFFE00
        self.refblock = self.be64(self.rt)

    def be32(self, offset: int) -> int:
        return int(struct.unpack_from(">I", self.data, offset)[0])

    def be64(self, offset: int) -> int:
        return int(struct.unpack_from(">Q", self.data, offset)[0])

    def l2_entry(self, guest_off: int) -> int:
        """Host offset of the L2 entry of a guest offset in the first table."""
        return self.l2 + (guest_off >> self.cluster_bits) * (16 if self.extended else 8)


def be64(value: int) -> bytes:
    return struct.pack(">Q", value & (1 << 64) - 1)


def be32(value: int) -> bytes:
    return struct.pack(">I", value & 0xFFFFFFFF)


def assert_typed(told: dict[str, Any]) -> dict[str, str]:
    assert not told["untyped"], told["untyped"]
    steps = told["steps"]
    assert isinstance(steps, dict)
    for name, outcome in steps.items():
        kind, _, message = outcome.partition(": ")
        if kind in ("CorruptImage", "FormatError", "UnsupportedFeature"):
            assert ".damaged" in message, f"{name} does not say which file: {outcome}"
    return steps


def test_the_undamaged_images_pass(victim: Victim, plain: Path, extended: Path) -> None:
    for path in (plain, extended):
        steps = assert_typed(victim.suffer(path, []))
        assert set(steps.values()) == {"ok"}, steps


# Field, offset, width, and values that no valid image of this shape has.
HEADER_FIELDS: list[tuple[str, int, int, list[int]]] = [
    ("magic", 0, 4, [0, 0x514649FA, 0xFFFFFFFF]),
    ("version", 4, 4, [0, 1, 4, 0xFFFFFFFF]),
    ("cluster_bits", 20, 4, [0, 8, 22, 32, 63, 64, 0xFFFFFFFF]),
    ("size", 24, 8, [1 << 63, (1 << 64) - 1, 1 << 40]),
    ("crypt_method", 32, 4, [1, 2, 3, 0xFFFFFFFF]),
    ("l1_size", 36, 4, [0, 0xFFFFFFFF, 0x7FFFFFFF, (4 << 20) + 1]),
    ("l1_offset", 40, 8, [0, 1, 513, 1 << 30, 1 << 56, (1 << 64) - 4096, (1 << 64) - 1]),
    ("snapshots", 60, 4, [65537, 0xFFFFFFFF]),
    ("incompatible", 72, 8, [4, 32, 1 << 63, (1 << 64) - 1]),
    ("refcount_order", 96, 4, [7, 32, 64, 0xFFFFFFFF]),
    ("header_length", 100, 4, [0, 72, 103, 105, 4097, 0xFFFFFFF8]),
]
HEADER_CASES = [
    (name, offset, width, value)
    for name, offset, width, values in HEADER_FIELDS
    for value in values
]


@pytest.mark.parametrize(
    "name, offset, width, value", HEADER_CASES, ids=lambda v: f"{v:#x}" if isinstance(v, int) else v
)
def test_header_field_out_of_range(
    victim: Victim, plain: Path, name: str, offset: int, width: int, value: int
) -> None:
    steps = assert_typed(victim.suffer(plain, [(offset, value.to_bytes(width, "big"))]))
    assert steps["open"] != "ok"
    assert steps["open r+"] != "ok"
    kinds = ["FormatError", "UnsupportedFeature", "CorruptImage"]
    if name == "crypt_method" and value == 1:
        # AES, which needs no header of its own: all that is missing is the key.
        kinds.append("KeyRequired")
    assert steps["open"].split(":")[0] in kinds


@pytest.mark.parametrize(
    "name, offset, width, value",
    [
        ("rt_offset", 48, 8, 0),
        ("rt_offset", 48, 8, 1),
        ("rt_offset", 48, 8, 1 << 40),
        ("rt_offset", 48, 8, (1 << 64) - 4096),
        ("rt_clusters", 56, 4, 0),
        ("rt_clusters", 56, 4, 0xFFFFFFFF),
        ("rt_clusters", 56, 4, 2049),
    ],
)
def test_refcount_table_out_of_range_stops_writers(
    victim: Victim, plain: Path, name: str, offset: int, width: int, value: int
) -> None:
    steps = assert_typed(victim.suffer(plain, [(offset, value.to_bytes(width, "big"))]))
    assert steps["open r+"] != "ok" or steps["write last"] != "ok", steps


def test_compression_type_unknown(victim: Victim, plain: Path) -> None:
    for value in (2, 255):
        steps = assert_typed(victim.suffer(plain, [(79, b"\x08"), (104, bytes([value]))]))
        assert steps["open"].startswith("UnsupportedFeature") or steps["open"].startswith("Format")


def test_corrupt_images_take_no_writes_and_dirty_ones_are_mended(
    victim: Victim, plain: Path
) -> None:
    for bit, writes in ((1, "ok"), (2, "CorruptImage"), (3, "CorruptImage")):
        steps = assert_typed(victim.suffer(plain, [(79, bytes([bit]))]))
        assert steps["open"] == "ok"
        assert steps["open r+"].startswith(writes)


@pytest.mark.parametrize(
    "offset, size",
    [
        (0, 5),
        (1, 5),
        (100, 5),
        (4090, 10),
        (4096, 10),
        (1 << 40, 10),
        (200, 1024),
        (200, 0xFFFFFFFF),
    ],
)
def test_backing_name_out_of_range(victim: Victim, plain: Path, offset: int, size: int) -> None:
    steps = assert_typed(victim.suffer(plain, [(8, be64(offset) + be32(size))]))
    assert steps["open"] != "ok" or offset == 0


@pytest.mark.parametrize("name", [b"../../../etc/passwd", b"json:{}", b"\xff\xfe/x"])
def test_backing_name_is_not_followed(victim: Victim, plain: Path, name: bytes) -> None:
    patches = [(8, be64(1024) + be32(len(name))), (1024, name)]
    for policy in ("deny", "follow"):
        steps = assert_typed(victim.suffer(plain, patches, references=policy))
        assert steps["open"] != "ok"


@pytest.mark.parametrize(
    "kind", [0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0x12345]
)
@pytest.mark.parametrize("length", [1, 7, 49, 4000, 4096, 0x7FFFFFFF, 0xFFFFFFF8, 0xFFFFFFFF])
def test_extension_length_out_of_range(victim: Victim, plain: Path, kind: int, length: int) -> None:
    steps = assert_typed(victim.suffer(plain, [(112, be32(kind) + be32(length))]))
    if length >= 4096:
        assert steps["open"].startswith("FormatError")


# ---- Tables ----

OFF_LIMITS = {
    "unaligned": 0x200,
    "past the end": 1 << 30,
    "far past the end": 0x00FFFFFFFFFFE000,
}


@pytest.mark.parametrize("where", OFF_LIMITS)
@pytest.mark.parametrize("copied", [0, 1 << 63])
def test_l1_entry(victim: Victim, plain: Path, where: str, copied: int) -> None:
    t = Tables(plain)
    value = copied | OFF_LIMITS[where] | (t.l2 if where == "unaligned" else 0)
    steps = assert_typed(victim.suffer(plain, [(t.l1, be64(value))]))
    assert steps["read 0"].startswith("CorruptImage"), steps
    assert steps["extents"].startswith("CorruptImage")
    assert steps["write"].startswith("CorruptImage")
    assert steps["check"] == "ok"


@pytest.mark.parametrize("shape", ["plain", "extended"])
@pytest.mark.parametrize("where", OFF_LIMITS)
@pytest.mark.parametrize("flags", [0, 1 << 63])
def test_l2_entry(
    victim: Victim, request: pytest.FixtureRequest, shape: str, where: str, flags: int
) -> None:
    path = request.getfixturevalue(shape)
    t = Tables(path)
    at = t.l2_entry(0)
    host = t.be64(at) & 0x00FFFFFFFFFFFE00
    value = flags | OFF_LIMITS[where] | (host if where == "unaligned" else 0)
    steps = assert_typed(victim.suffer(path, [(at, be64(value))]))
    assert steps["read 0"].startswith("CorruptImage"), steps
    assert steps["read 131072"] == "ok"
    assert steps["extents"].startswith("CorruptImage")


@pytest.mark.parametrize(
    "bitmap", [0x1, 0xFFFFFFFF, 0x0000000100000001, 0xFFFFFFFFFFFFFFFF, 0x8000000080000000]
)
def test_subcluster_bitmap_that_contradicts_itself(
    victim: Victim, extended: Path, bitmap: int
) -> None:
    """Allocated without a host cluster, or allocated and zero at once."""
    t = Tables(extended)
    at = t.l2_entry(0)
    unmapped = assert_typed(victim.suffer(extended, [(at, be64(0) + be64(bitmap))]))
    assert unmapped["read 0"].startswith("CorruptImage"), unmapped
    if bitmap & (bitmap >> 32):
        both = assert_typed(victim.suffer(extended, [(at + 8, be64(bitmap))]))
        assert both["read 0"].startswith("CorruptImage"), both


@pytest.mark.parametrize(
    "damage", ["past the end", "no end", "not a stream", "cut short", "header"]
)
def test_compressed_descriptor(victim: Victim, plain: Path, damage: str) -> None:
    t = Tables(plain)
    at = t.l2_entry(64 * KiB)
    entry = t.be64(at)
    assert entry >> 62 == 1
    shift = 62 - (t.cluster_bits - 8)
    offset = entry & (1 << shift) - 1
    value = {
        "past the end": 1 << 62 | 1 << 40,
        "no end": 1 << 62 | ((1 << 62 - shift) - 1) << shift | (len(t.data) - 1),
        "not a stream": entry & ~((1 << shift) - 1) | (t.be64(t.l2_entry(0)) & 0x00FFFFFFFFFFFE00),
        "cut short": entry,
        "header": 1 << 62,
    }[damage]
    patches = [(at, be64(value))]
    if damage == "cut short":
        patches.append((offset + 4, bytes(20)))
    steps = assert_typed(victim.suffer(plain, patches))
    assert steps["read 65536"].startswith("CorruptImage"), steps
    assert steps["read 0"] == "ok"


@pytest.mark.parametrize("value", [0x200, 0x1F, 1 << 40, (1 << 64) - 4096, (1 << 64) - 1])
def test_refcount_table_entry(victim: Victim, plain: Path, value: int) -> None:
    t = Tables(plain)
    steps = assert_typed(victim.suffer(plain, [(t.rt, be64(value))]))
    assert steps["read 0"] == "ok"
    # In place nothing is allocated; but after the discard there is nothing in place any more.
    assert steps["open r+"] != "ok" or steps["write again"] != "ok", steps
    assert steps["check"] == "ok"


def test_refcounts_of_zero_do_not_give_tables_away(victim: Victim, plain: Path) -> None:
    """Every cluster claims to be free: the header and the tables must survive a writer."""
    t = Tables(plain)
    told = victim.suffer(plain, [(t.refblock, bytes(512))])
    steps = assert_typed(told)
    assert steps["read 0"] == "ok"
    after = bytearray(Path(f"{plain}.damaged").read_bytes())
    # The writer that finds out marks the image corrupt; else the header is as it was.
    after[79] &= ~2
    assert after[:112] == t.data[:112]


def test_tables_that_point_at_each_other(victim: Victim, plain: Path) -> None:
    t = Tables(plain)
    for target in (t.l1, t.rt, t.refblock, t.l2):
        assert_typed(victim.suffer(plain, [(t.l1, be64(target | 1 << 63))]))
        assert_typed(victim.suffer(plain, [(t.rt, be64(target))]))
        assert_typed(victim.suffer(plain, [(40, be64(target))]))
        assert_typed(victim.suffer(plain, [(48, be64(target))]))
        assert_typed(victim.suffer(plain, [(t.l2_entry(0), be64(target | 1 << 63))]))


# ---- Whole files ----


@pytest.mark.parametrize("shape", ["plain", "extended", "overlay"])
def test_cut_off_at_every_interesting_length(
    victim: Victim, request: pytest.FixtureRequest, shape: str
) -> None:
    """Either an error, or for a cluster that the file ends in, zeros where its bytes are gone."""
    path = request.getfixturevalue(shape)
    t = Tables(path)
    whole = victim.suffer(path, [], want_data=True, references="follow")["reads"]
    lengths = {0, 1, 3, 4, 8, 20, 24, 71, 72, 73, 100, 103, 104, 111, 112, 113, 200, 511, 513}
    for edge in range(0, len(t.data), 512 if t.cluster <= 4096 else 4096):
        lengths |= {edge, edge + 1}
    for length in sorted(lengths):
        if length >= len(t.data):
            continue
        told = victim.suffer(path, [], length=length, want_data=True, references="follow")
        steps = assert_typed(told)
        if length < 104:
            assert steps["open"] != "ok"
        for got, wanted in zip(told["reads"], whole, strict=False):
            data = bytes.fromhex(got)
            right = bytes.fromhex(wanted)
            if data in (b"", right):
                continue
            for at in range(len(data)):
                assert data[at] in (right[at], 0), f"cut at {length}: foreign byte at {at:#x}"


@pytest.mark.parametrize("shape", ["plain", "extended", "overlay", "tiny", "v2"])
def test_random_damage_to_metadata(
    victim: Victim, request: pytest.FixtureRequest, folder: Path, shape: str
) -> None:
    if shape == "tiny":
        path = make(folder / "tiny.qcow2", cluster_size=512, refcount_bits=1)
    elif shape == "v2":
        path = make(folder / "v2.qcow2", compat="0.10")
    else:
        path = request.getfixturevalue(shape)
    t = Tables(path)
    # Header, L1, the first L2 table, refcount table and block; little of the rest.
    spots = [(0, 160), (t.l1, 8 * t.l1_size), (t.l2, 1024), (t.rt, 64), (t.refblock, 256)]
    for seed in range(FLIPS):
        rng = random.Random(f"{shape} {seed}")
        patches = []
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            start, length = rng.choice(spots)
            at = start + rng.randrange(length)
            if rng.random() < 0.6:
                value = bytes([t.data[at] ^ 1 << rng.randrange(8)])
            else:
                value = rng.choice([b"\0", b"\xff", b"\xff" * 8, bytes(8), rng.randbytes(8)])
            patches.append((at, value))
        try:
            assert_typed(victim.suffer(path, patches, references="follow"))
        except AssertionError as exc:
            raise AssertionError(f"seed {seed} of {shape}: {exc}") from exc


def test_random_garbage_is_no_image(victim: Victim, folder: Path) -> None:
    for seed in range(50):
        path = folder / "garbage"
        data = bytearray(random.Random(seed).randbytes(8192))
        if seed % 2:
            data[:8] = b"QFI\xfb" + be32(2 + seed % 3)
        path.write_bytes(data)
        steps = assert_typed(victim.suffer(path, []))
        assert steps["open"] != "ok"
