"""Encrypted images: LUKS and legacy AES, both ways with QEMU's tools."""

import itertools
import json
import os
import random
import struct
import subprocess
import sys
import threading
from array import array

import pytest

import qcow2x
from qcow2x import encryption
from qcow2x._core.header import Header
from qcow2x.errors import CorruptImage, FormatError, ImageBroken, KeyRequired, UnsupportedFeature

KiB, MiB = 1 << 10, 1 << 20
PASSPHRASE = "correct horse"
#: What `qemu-img create` of this QEMU makes with AES; see encrypt.* of its options.
CIPHERS = {
    "default": {},
    "aes-128": {"cipher-alg": "aes-128", "hash-alg": "sha1"},
    "aes-192": {"cipher-alg": "aes-192", "hash-alg": "sha512"},
    "plain": {"ivgen-alg": "plain", "hash-alg": "md5"},
    "xts-essiv": {"ivgen-alg": "essiv", "hash-alg": "sha384"},
    "cbc": {"cipher-mode": "cbc"},
    "cbc-128-plain": {
        "cipher-mode": "cbc",
        "cipher-alg": "aes-128",
        "ivgen-alg": "plain",
        "hash-alg": "sha224",
    },
    "cbc-essiv": {"cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "ripemd160"},
    "cbc-essiv-md5": {"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "md5"},
}
SHAPES = [
    {"cluster_size": 512},
    {"cluster_size": 4096},
    {"cluster_size": 65536},
    {"cluster_size": 2 * MiB},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 65536, "extended_l2": True},
    {"cluster_size": 65536, "compat": "0.10"},
]


def shape_id(value):
    return "-".join(map(str, value.values()))


def run(*args, code=0):
    done = subprocess.run([*map(str, args)], check=False, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout


def secret(passphrase=PASSPHRASE, name="s"):
    return ("--object", f"secret,id={name},data={passphrase}")


def image_opts(path, fmt="luks"):
    return f"driver=qcow2,encrypt.format={fmt},encrypt.key-secret=s,file.filename={path}"


def qemu_create(path, size, fmt="luks", options=(), passphrase=PASSPHRASE, **crypt):
    if fmt == "luks":
        crypt["iter-time"] = 10
    told = [f"encrypt.format={fmt}", "encrypt.key-secret=s"]
    told += [f"encrypt.{name}={value}" for name, value in crypt.items()]
    told += [f"{name}={'on' if value is True else value}" for name, value in dict(options).items()]
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *secret(passphrase)]
    # QEMU measures how fast it is on a clock of its own, and gives up now and then.
    for _ in range(50):
        done = subprocess.run(
            [*command, "-o", ",".join(told), str(path), str(size)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return
    pytest.fail(done.stderr)


def qemu_io(path, *commands, fmt="luks", passphrase=PASSPHRASE):
    args = list(itertools.chain.from_iterable(("-c", command) for command in commands))
    out = run("qemu-io", *secret(passphrase), "--image-opts", image_opts(path, fmt), *args)
    assert "failed" not in out and "error" not in out.lower(), out


def qemu_disk(path, tmp_path, fmt="luks", passphrase=PASSPHRASE):
    """Every byte of the disk as QEMU reads it."""
    raw = tmp_path / "as-qemu-reads-it.raw"
    opts = image_opts(path, fmt)
    run("qemu-img", "convert", *secret(passphrase), "--image-opts", opts, "-O", "raw", raw)
    return raw.read_bytes()


def assert_clean(path, fmt="luks", passphrase=PASSPHRASE):
    opts = image_opts(path, fmt)
    told = run("qemu-img", "check", *secret(passphrase), "--output=json", "--image-opts", opts)
    found = json.loads(told)
    assert not found.get("leaks") and not found.get("corruptions") and not found["check-errors"]
    with qcow2x.open(path, key=passphrase) as image:
        assert image.check().clean


def new_encryption(**changed):
    return qcow2x.Encryption(**{"key": PASSPHRASE, "iter_time_ms": 10, **changed})


def write_at_random(image, model, rng, times=40):
    """Every kind of write, most of them not whole sectors."""
    size = len(model)
    for _ in range(times):
        length = rng.choice([1, 3, 511, 512, 513, 5000, 65536, 70000, 200_000])
        offset = rng.randrange(size - 1)
        if rng.random() < 0.3:
            offset &= ~511
        length = min(length, size - offset)
        act = rng.random()
        if act < 0.8:
            data = rng.randbytes(length)
            image.pwrite(data, offset)
            model[offset : offset + length] = data
        else:
            image.write_zeroes(offset, length, unmap=act < 0.9)
            model[offset : offset + length] = bytes(length)
        part = rng.randrange(size)
        assert image.pread(1000, part) == model[part : part + 1000]


# --- both ways with QEMU -------------------------------------------------------------------


@pytest.mark.parametrize("name", CIPHERS)
def test_every_cipher_that_qemu_creates(tmp_path, name):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, 2 * MiB, **CIPHERS[name])
    qemu_io(path, "write -P 17 0 100k", "write -P 34 1M 64k")
    model = bytearray(2 * MiB)
    model[: 100 * KiB] = bytes([17]) * (100 * KiB)
    model[MiB : MiB + 64 * KiB] = bytes([34]) * (64 * KiB)
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        assert image.pread(2 * MiB, 0) == model
        write_at_random(image, model, random.Random(name))
    assert qemu_disk(path, tmp_path) == model
    assert_clean(path)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"cipher": "aes-128"},
        {"cipher": "aes-192"},
        {"mode": "cbc"},
        {"mode": "cbc", "cipher": "aes-128", "ivgen": "plain"},
        {"mode": "cbc", "ivgen": "essiv"},
        {"mode": "cbc", "ivgen": "essiv", "ivgen_hash": "md5"},
        {"ivgen": "essiv", "hash": "sha1"},
        {"hash": "ripemd160"},
        {"hash": "sha512"},
        {"format": "aes"},
    ],
    ids=lambda changed: "-".join(changed.values()) or "default",
)
def test_qemu_uses_what_is_created_here(tmp_path, changed):
    path = tmp_path / "disk.qcow2"
    fmt = changed.get("format", "luks")
    qcow2x.create(path, 2 * MiB, encryption=new_encryption(**changed))
    assert qemu_disk(path, tmp_path, fmt) == bytes(2 * MiB)
    model = bytearray(2 * MiB)
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        write_at_random(image, model, random.Random(1))
    assert qemu_disk(path, tmp_path, fmt) == model
    qemu_io(path, "write -P 5 4000 300k", fmt=fmt)
    model[4000 : 4000 + 300 * KiB] = bytes([5]) * (300 * KiB)
    with qcow2x.open(path, key=PASSPHRASE) as image:
        assert image.pread(2 * MiB, 0) == model
    assert_clean(path, fmt)


@pytest.mark.parametrize("fmt", ["luks", "aes"])
@pytest.mark.parametrize("backed", [False, True], ids=["", "backing"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_shape(tmp_path, shape, backed, fmt):
    path, base = tmp_path / "disk.qcow2", tmp_path / "base.raw"
    rng = random.Random(f"{shape}{backed}{fmt}")
    size = 3 * MiB + 512
    model = bytearray(size)
    options = dict(shape)
    if backed:
        base.write_bytes(rng.randbytes(MiB + 1000))
        model[: MiB + 1000] = base.read_bytes()
        # What is behind the backing file's last sector is not part of it.
        options.update(backing_file=str(base), backing_format="raw")
    qcow2x.create(path, size, encryption=new_encryption(format=fmt), **options)
    with qcow2x.open(path, "r+", key=PASSPHRASE, references="follow") as image:
        assert image.pread(size, 0) == model
        write_at_random(image, model, rng)
        image.flush()
        write_at_random(image, model, rng)
        assert image.pread(size, 0) == model
    assert qemu_disk(path, tmp_path, fmt) == model
    with qcow2x.open(path, key=PASSPHRASE, references="follow", cache="none") as image:
        assert image.pread(size, 0) == model


def test_data_on_the_host_is_not_the_guests(tmp_path):
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB, encryption=new_encryption())
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        image.pwrite(b"the quick brown fox " * 10_000, 100)
        image.pwrite(b"jumps", 900_000)
    stored = path.read_bytes()
    assert b"brown fox" not in stored and b"jumps" not in stored
    # Nor are the zeros around a short write.
    with qcow2x.open(path, key=PASSPHRASE) as image:
        place = next(e.host_offset for e in image.extents(851_968) if e.host_offset)
    assert bytes(512) not in stored[place : place + 65536]


def test_equal_sectors_are_stored_differently_and_so_are_equal_images(tmp_path):
    stored = []
    for name in ("a", "b"):
        qcow2x.create(tmp_path / name, MiB, encryption=new_encryption())
        with qcow2x.open(tmp_path / name, "r+", key=PASSPHRASE) as image:
            image.pwrite(b"x" * 65536, 0)
            place = next(image.extents()).host_offset
        data = (tmp_path / name).read_bytes()[place : place + 65536]
        stored += [data[at : at + 512] for at in range(0, len(data), 512)]
    assert len(set(stored)) == len(stored)


def test_writes_beside_a_snapshot_keep_both_readable(tmp_path):
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 2 * MiB, encryption=new_encryption())
    model = bytearray(2 * MiB)
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        write_at_random(image, model, random.Random(3))
    before = bytes(model)
    run("qemu-img", "snapshot", *secret(), "--image-opts", "-c", "then", image_opts(path))
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        write_at_random(image, model, random.Random(4))
    assert qemu_disk(path, tmp_path) == model
    assert_clean(path)
    run("qemu-img", "snapshot", *secret(), "--image-opts", "-a", "then", image_opts(path))
    with qcow2x.open(path, key=PASSPHRASE) as image:
        assert image.pread(2 * MiB, 0) == before


def test_resize_grows_and_shrinks(tmp_path):
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB + 512, encryption=new_encryption())
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        image.pwrite(b"y" * (MiB + 512), 0)
        image.resize(MiB - 1024, shrink=True)
        image.resize(4 * MiB)
        image.resize(6 * MiB, preallocation="metadata")
        image.pwrite(b"z" * 100, 5 * MiB + 7)
    model = bytearray(6 * MiB)
    model[: MiB - 1024] = b"y" * (MiB - 1024)
    model[5 * MiB + 7 :][:100] = model[5 * MiB + 7 : 5 * MiB + 107] = b"z" * 100
    assert qemu_disk(path, tmp_path) == model
    assert_clean(path)


@pytest.mark.parametrize("shape", SHAPES[1:6], ids=shape_id)
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocated_reads_as_zeros(tmp_path, mode, shape):
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 5 * MiB, encryption=new_encryption(), preallocation=mode, **shape)
    assert_clean(path)
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        assert image.pread(5 * MiB, 0) == bytes(5 * MiB)
        before = image.stats().clusters_allocated
        image.pwrite(b"q" * 1000, 2 * MiB + 100)
        assert image.stats().clusters_allocated == before
    model = bytearray(5 * MiB)
    model[2 * MiB + 100 : 2 * MiB + 1100] = b"q" * 1000
    assert qemu_disk(path, tmp_path) == model


def test_version_2_cannot_be_preallocated(tmp_path):
    with pytest.raises(UnsupportedFeature, match="version 2"):
        qcow2x.create(
            tmp_path / "x", MiB, compat="0.10", preallocation="full", encryption=new_encryption()
        )
    assert not (tmp_path / "x").exists()


def test_version_2_that_cannot_be_preallocated_does_not_grow(tmp_path):
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB, compat="0.10", encryption=new_encryption())
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        with pytest.raises(UnsupportedFeature):
            image.resize(2 * MiB, preallocation="full")
        assert image.size == MiB


def test_convert_and_compare_read_encrypted_images(tmp_path):
    path, plain = tmp_path / "disk.qcow2", tmp_path / "plain.qcow2"
    qemu_create(path, 8 * MiB, options={"preallocation": "metadata"})
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        image.pwrite(b"w" * 3 * MiB, MiB)
    whole = qemu_disk(path, tmp_path)
    with qcow2x.open(path, key=PASSPHRASE) as image:
        qcow2x.convert(image, plain)
    with qcow2x.open(plain) as copy:
        # QEMU's preallocation leaves what decrypts to anything but zeros: that is the disk then.
        assert copy.pread(8 * MiB, 0) == whole


# --- compressed clusters -------------------------------------------------------------------


def test_compressed_writes_are_refused(tmp_path):
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB, encryption=new_encryption())
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        with pytest.raises(UnsupportedFeature, match="compressed"):
            image.pwrite_compressed(bytes(65536), 0)
        with pytest.raises(UnsupportedFeature, match="compressed"):
            image.write_compressed_batch(b"", array("I", [0]), bytes(65536), 0)
        assert image.pread(65536, 0) == bytes(65536)


def test_compressed_clusters_of_an_encrypted_image_are_read_as_they_are(tmp_path):
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB)
    with qcow2x.open(path, "r+") as image:
        image.pwrite_compressed(b"c" * 65536, 65536)
    with path.open("r+b") as file:
        file.seek(32)
        file.write(struct.pack(">I", 1))
    with qcow2x.open(path, "r+", key="k") as image:
        assert image.pread(65536, 65536) == b"c" * 65536
        image.pwrite(b"d" * 10, 65540)
        assert image.pread(20, 65536) == b"cccc" + b"d" * 10 + b"c" * 6
    assert qemu_disk(path, tmp_path, "aes", "k")[65536:65556] == b"cccc" + b"d" * 10 + b"c" * 6


# --- threads -------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [{}, {"mode": "cbc"}], ids=["xts", "cbc"])
def test_threads_that_share_sectors_lose_no_byte(tmp_path, changed):
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, MiB, encryption=new_encryption(**changed), cluster_size=4096)
    writers, failures = 8, []

    def write_own_bytes(image, number):
        rng = random.Random(number)
        try:
            for turn in range(150):
                at = rng.randrange(0, 16384, writers) + number
                image.pwrite(bytes([number * 16 + turn % 16]), at)
                assert image.pread(1, at) == bytes([number * 16 + turn % 16])
                written[at] = number * 16 + turn % 16
        except BaseException as exc:
            failures.append(exc)

    def write_whole_sectors(image):
        try:
            for turn in range(100):
                image.pwrite(bytes([turn]) * 8192, 65536 - 2048)
                assert set(image.pread(8192, 65536 - 2048)) == {turn}
        except BaseException as exc:
            failures.append(exc)

    written = bytearray(16384)
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        threads = [
            threading.Thread(target=write_own_bytes, args=(image, number))
            for number in range(writers)
        ]
        threads.append(threading.Thread(target=write_whole_sectors, args=(image,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert image.pread(16384, 0) == written
    assert_clean(path)


# --- keys ----------------------------------------------------------------------------------


def keyed(tmp_path, name="disk.qcow2", **changed):
    path = tmp_path / name
    qcow2x.create(path, MiB, encryption=new_encryption(**changed))
    with qcow2x.open(path, "r+", key=changed.get("key", PASSPHRASE)) as image:
        image.pwrite(b"secret", 0)
    return path


def reads(path, key):
    with qcow2x.open(path, key=key) as image:
        return image.pread(6, 0)


@pytest.mark.parametrize(
    "key", [None, "wrong", b"", PASSPHRASE + " ", lambda name: None, {}, {"other": PASSPHRASE}]
)
def test_without_the_key_nothing_opens(tmp_path, key):
    path = keyed(tmp_path)
    before = path.read_bytes()
    for mode in ("r", "r+"):
        with pytest.raises(KeyRequired) as caught:
            qcow2x.open(path, mode, key=key)
        assert isinstance(caught.value, PermissionError) and str(path) in str(caught.value)
    assert path.read_bytes() == before
    with qcow2x.open(path, "r+", key=PASSPHRASE):
        pass  # and no lock stayed behind


def test_a_key_may_come_in_every_way(tmp_path):
    path = keyed(tmp_path)
    asked = []

    def ask(name):
        asked.append(name)
        return PASSPHRASE.encode()

    raw = PASSPHRASE.encode()
    for key in (PASSPHRASE, raw, bytearray(raw), memoryview(raw), ask, {str(path): PASSPHRASE}):
        assert reads(path, key) == b"secret"
    assert asked == [str(path)]
    assert reads(path, {str(path): ask}) == b"secret"
    with pytest.raises(TypeError, match="bytes or text"):
        reads(path, 1234)


@pytest.mark.parametrize("passphrase", ["p", "pässwörd ☃", "x" * 1000])
def test_any_text_is_a_passphrase(tmp_path, passphrase):
    path = keyed(tmp_path, key=passphrase)
    assert reads(path, passphrase.encode("utf-8")) == b"secret"
    assert qemu_disk(path, tmp_path, passphrase=passphrase)[:6] == b"secret"


def test_what_a_callable_returns_is_wiped_and_what_the_caller_keeps_is_not(tmp_path):
    path = keyed(tmp_path)
    handed, kept = bytearray(PASSPHRASE.encode()), bytearray(PASSPHRASE.encode())
    assert reads(path, lambda name: handed) == b"secret"
    assert handed == bytes(len(handed))
    assert reads(path, kept) == b"secret"
    assert kept == PASSPHRASE.encode()
    wrong = bytearray(b"wrong")
    with pytest.raises(KeyRequired):
        reads(path, lambda name: wrong)
    assert wrong == bytes(5)


def test_the_key_is_in_no_text(tmp_path):
    assert PASSPHRASE not in repr(new_encryption())
    path = keyed(tmp_path)
    with pytest.raises(KeyRequired) as caught:
        reads(path, "open sesame")
    assert "sesame" not in str(caught.value)
    assert PASSPHRASE.encode() not in path.read_bytes()


def test_a_key_for_an_image_without_encryption(tmp_path):
    qcow2x.create(tmp_path / "plain", MiB)
    with pytest.raises(ValueError, match="not encrypted"):
        qcow2x.open(tmp_path / "plain", key="k")
    # What knows the keys of many images may be used for all.
    qcow2x.open(tmp_path / "plain", key=lambda name: "k").close()
    qcow2x.open(tmp_path / "plain", key={"other": "k"}).close()


def test_each_layer_of_a_chain_has_its_own_key(tmp_path):
    base = keyed(tmp_path, "base.qcow2", key="below")
    top = tmp_path / "top.qcow2"
    qcow2x.create(
        top,
        backing_file=str(base),
        backing_format="qcow2",
        encryption=new_encryption(format="aes", key="above"),
    )
    keys = {str(base): "below", str(top): "above"}
    with qcow2x.open(top, "r+", key=keys, references="follow") as image:
        assert image.pread(6, 0) == b"secret"
        image.pwrite(b"S", 0)
        assert image.pread(6, 0) == b"Secret"
    with pytest.raises(KeyRequired, match="base"):
        qcow2x.open(top, key={str(top): "above"}, references="follow")
    with qcow2x.open(top, key=keys.get, references="follow") as image:
        assert image.pread(6, 0) == b"Secret"


def test_legacy_images_cannot_tell_a_wrong_key(tmp_path):
    path = keyed(tmp_path, format="aes")
    assert reads(path, PASSPHRASE) == b"secret"
    # 16 bytes count.
    assert reads(path, PASSPHRASE.encode().ljust(16, b"\0") + b"whatever") == b"secret"
    assert reads(path, "wrong") != b"secret"


# --- key slots -----------------------------------------------------------------------------


def change_slots(path, change):
    with qcow2x.FileStorage(path, writable=True) as storage:
        return change(storage, Header.load(storage.pread, storage.size(), str(path)))


def active_slots(path):
    told = change_slots(path, encryption.describe)
    return [number for number, slot in enumerate(told.slots) if slot.active]


def test_key_slots_are_added_and_erased(tmp_path):
    path = keyed(tmp_path)

    def add(storage, header):
        return encryption.add_key(storage, header, PASSPHRASE, "second", iter_time_ms=10)

    assert change_slots(path, add) == 1
    assert change_slots(path, add) == 2
    assert active_slots(path) == [0, 1, 2]
    assert reads(path, PASSPHRASE) == reads(path, "second") == b"secret"
    assert qemu_disk(path, tmp_path, passphrase="second")[:6] == b"secret"
    assert change_slots(path, lambda s, h: encryption.erase_key(s, h, slot=0)) == [0]
    with pytest.raises(KeyRequired):
        reads(path, PASSPHRASE)
    run("qemu-img", "check", *secret(), "--image-opts", image_opts(path), code=1)
    assert reads(path, "second") == b"secret"
    with pytest.raises(ValueError, match="refusing"):
        change_slots(path, lambda s, h: encryption.erase_key(s, h, key="second"))
    assert active_slots(path) == [1, 2]
    with pytest.raises(KeyRequired):
        change_slots(path, lambda s, h: encryption.erase_key(s, h, key=PASSPHRASE))
    with pytest.raises(ValueError, match="already erased"):
        change_slots(path, lambda s, h: encryption.erase_key(s, h, slot=0))
    assert_clean(path, passphrase="second")
    assert change_slots(
        path, lambda s, h: encryption.erase_key(s, h, key="second", force=True)
    ) == [1, 2]
    assert active_slots(path) == []
    with pytest.raises(KeyRequired):
        reads(path, "second")


def test_erased_key_material_is_gone(tmp_path):
    path = keyed(tmp_path)
    change_slots(path, lambda s, h: encryption.add_key(s, h, PASSPHRASE, "b", iter_time_ms=10))
    before = path.read_bytes()
    start = Header.parse(before[:65536]).crypto_header[0]
    change_slots(path, lambda s, h: encryption.erase_key(s, h, slot=0))
    after = path.read_bytes()
    material = slice(start + 4096, start + 4096 + 256_000)
    same = sum(a == b for a, b in zip(before[material], after[material], strict=True))
    assert same < 3000  # of 256000; chance makes about 1000 agree
    # Putting the old header back does not bring the key back.
    with path.open("r+b") as file:
        file.seek(start)
        file.write(before[start : start + 592])
    with pytest.raises(KeyRequired):
        reads(path, PASSPHRASE)


def test_eight_slots_and_no_more(tmp_path):
    path = keyed(tmp_path)
    for number in range(1, 8):
        change_slots(
            path,
            lambda s, h, n=number: encryption.add_key(s, h, PASSPHRASE, f"k{n}", iter_time_ms=1),
        )
    with pytest.raises(ValueError, match="all keyslots are in use"):
        change_slots(path, lambda s, h: encryption.add_key(s, h, PASSPHRASE, "k9"))
    with pytest.raises(ValueError, match="overwrite active keyslot 3"):
        change_slots(path, lambda s, h: encryption.add_key(s, h, PASSPHRASE, "k9", slot=3))
    with pytest.raises(KeyRequired):
        change_slots(path, lambda s, h: encryption.erase_key(s, h, key="k9"))
    assert reads(path, "k7") == b"secret"
    assert qemu_disk(path, tmp_path, passphrase="k7")[:6] == b"secret"


def test_slots_that_qemu_amended(tmp_path):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, MiB)
    objects = (*secret(), *secret("new one", "n"))
    more = "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10,encrypt.keyslot=5"
    for _ in range(50):
        done = subprocess.run(
            ["qemu-img", "amend", *objects, "--image-opts", "-o", more, image_opts(path)],
            check=False,
            capture_output=True,
        )
        if done.returncode == 0:
            break
    assert active_slots(path) == [0, 5]
    assert reads(path, "new one") == reads(path, PASSPHRASE)
    less = "encrypt.state=inactive,encrypt.keyslot=0"
    run(
        "qemu-img",
        "amend",
        *objects,
        "--image-opts",
        "-o",
        less,
        image_opts(path).replace("=s", "=n"),
    )
    assert active_slots(path) == [5]
    with pytest.raises(KeyRequired):
        reads(path, PASSPHRASE)


def test_describe_says_what_qemu_says(tmp_path):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, MiB, **CIPHERS["cbc-essiv"])
    told = json.loads(run("qemu-img", "info", "--output=json", path))
    told = told["format-specific"]["data"]["encrypt"]
    ours = change_slots(path, encryption.describe)
    assert (ours.cipher, ours.mode, ours.ivgen, ours.ivgen_hash, ours.hash) == (
        told["cipher-alg"],
        told["cipher-mode"],
        told["ivgen-alg"],
        told["ivgen-hash-alg"],
        told["hash-alg"],
    )
    assert (ours.uuid, ours.payload_offset) == (told["uuid"], told["payload-offset"])
    assert ours.master_key_iterations == told["master-key-iters"]
    for slot, theirs in zip(ours.slots, told["slots"], strict=True):
        assert (slot.active, slot.key_offset) == (theirs["active"], theirs["key-offset"])
        if slot.active:
            assert (slot.iterations, slot.stripes) == (theirs["iters"], theirs["stripes"])


@pytest.mark.not_for_qemu("ciphers that only QEMU knows")
@pytest.mark.parametrize("name", ["aes-192", "cbc-essiv", "legacy", "serpent"])
def test_info_needs_no_key_and_tells_what_qemu_tells(tmp_path, name):
    path = tmp_path / "disk.qcow2"
    known = {"legacy": {}, "serpent": {"cipher-alg": "serpent-256"}, **CIPHERS}
    qemu_create(path, MiB, fmt="aes" if name == "legacy" else "luks", **known[name])
    ours = run(sys.executable, "-m", "qcow2x", "info", path)
    theirs = run("qemu-img", "info", path)

    def encrypt_part(text):
        lines = text.splitlines()
        # QEMU 7.2 does not know of detached headers.
        lines = [line for line in lines if "detached header" not in line]
        start = lines.index("    encrypt:")
        return list(itertools.takewhile(lambda line: "corrupt:" not in line, lines[start:]))

    if name == "serpent":
        assert encrypt_part(ours) == ["    encrypt:", "        format: luks"]
        return
    assert encrypt_part(ours) == encrypt_part(theirs)
    assert "encrypted: yes" in ours.splitlines()
    as_json = json.loads(run(sys.executable, "-m", "qcow2x", "info", "--output=json", path))
    told = json.loads(run("qemu-img", "info", "--output=json", path))
    as_json["format-specific"]["data"]["encrypt"].pop("detached-header", None)
    assert as_json["format-specific"] == told["format-specific"]


# --- hostile and unknown headers -----------------------------------------------------------

# Name: (offset, new bytes, what is raised).
DAMAGE = {
    "magic": (0, b"LUKS\xba\xbf", FormatError),
    "version 2": (6, b"\0\2", FormatError),
    "version 0": (6, b"\0\0", FormatError),
    "cipher": (8, b"serpent\0", UnsupportedFeature),
    "cipher empty": (8, bytes(32), UnsupportedFeature),
    "cipher endless": (8, b"a" * 32, FormatError),
    "cipher of controls": (8, b"\x1b[31m\0", UnsupportedFeature),
    "mode": (40, b"ctr-plain64\0", UnsupportedFeature),
    "mode without generator": (40, b"xts\0", UnsupportedFeature),
    "generator": (40, b"xts-benbi\0", UnsupportedFeature),
    "essiv hash": (40, b"xts-essiv:sha512\0", UnsupportedFeature),
    "essiv without hash": (40, b"xts-essiv\0" + bytes(8), UnsupportedFeature),
    "mode endless": (40, b"x" * 32, FormatError),
    "mode of another key size": (40, b"cbc-plain64\0", FormatError),
    "hash": (72, b"whirlpool\0", UnsupportedFeature),
    "hash endless": (72, b"s" * 32, FormatError),
    "payload": (104, struct.pack(">I", 0), FormatError),
    "key bytes 0": (108, struct.pack(">I", 0), FormatError),
    "key bytes 65": (108, struct.pack(">I", 65), FormatError),
    "key bytes huge": (108, b"\xff\xff\xff\xff", FormatError),
    "digest": (112, bytes(20), KeyRequired),
    "digest salt": (132, bytes(32), KeyRequired),
    "digest iterations 0": (164, struct.pack(">I", 0), FormatError),
    "digest iterations huge": (164, b"\xff\xff\xff\xff", FormatError),
    "uuid endless": (168, b"u" * 40, FormatError),
    "slot state": (208, struct.pack(">I", 7), FormatError),
    "slot disabled": (208, struct.pack(">I", 0xDEAD), KeyRequired),
    "slot iterations 0": (212, struct.pack(">I", 0), FormatError),
    "slot iterations 1": (212, struct.pack(">I", 1), KeyRequired),
    "slot iterations huge": (212, b"\xff\xff\xff\xff", FormatError),
    "slot iterations past the limit": (
        212,
        struct.pack(">I", encryption.MAX_ITERATIONS),
        FormatError,
    ),
    "slot salt": (216, bytes(32), KeyRequired),
    "slot in the header": (248, struct.pack(">I", 1), FormatError),
    "slot at the end": (248, struct.pack(">I", 4032), FormatError),
    "slot far away": (248, b"\xff\xff\xff\xff", FormatError),
    "slot on the next one": (248, struct.pack(">I", 600), FormatError),
    "stripes": (252, struct.pack(">I", 3999), FormatError),
    "stripes huge": (252, b"\xff\xff\xff\xff", FormatError),
    "last slot": (544, bytes(48), FormatError),
    "key material": (4096, bytes(4096), KeyRequired),
}


@pytest.mark.not_for_qemu("damaged")
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_header(tmp_path, name):
    path = keyed(tmp_path)
    offset, data, error = DAMAGE[name]
    start = Header.parse(path.read_bytes()[:65536]).crypto_header[0]
    with path.open("r+b") as file:
        file.seek(start + offset)
        file.write(data)
    with pytest.raises(error) as caught:
        qcow2x.open(path, "r+", key=PASSPHRASE)
    assert type(caught.value) is error
    assert str(path) in str(caught.value) and "\x1b" not in str(caught.value)
    # What needs no data still works: who asks for the size has no key.
    assert Header.parse(path.read_bytes()[:65536]).size == MiB


@pytest.mark.not_for_qemu("damaged")
def test_a_mapping_into_the_luks_header_takes_no_write(tmp_path):
    path = keyed(tmp_path)
    whole = path.read_bytes()
    header = Header.parse(whole[:65536])
    with path.open("r+b") as file:
        l2_table = struct.unpack_from(">Q", whole, header.l1_offset)[0] & ((1 << 56) - 1)
        file.seek(l2_table)
        file.write(struct.pack(">Q", header.crypto_header[0] | 1 << 63))
    image = qcow2x.open(path, "r+", key=PASSPHRASE)
    with pytest.raises(CorruptImage):
        image.pwrite(b"overwrites the keys", 0)
    with pytest.raises(ImageBroken):
        image.close()
    assert reads(path, PASSPHRASE) != b"secret"  # but it opens


def test_an_encrypted_snapshot_opens_beside_the_live_disk(tmp_path):
    path = keyed(tmp_path)
    with qcow2x.open(path, "r+", key=PASSPHRASE) as image:
        image.snapshots.create("then")
        image.pwrite(b"public", 0)
        with image.snapshots.open("then") as then:
            assert then.pread(6, 0) == b"secret"
        assert image.pread(6, 0) == b"public"
    with qcow2x.open(path, key=PASSPHRASE, snapshot="then") as then:
        assert then.pread(6, 0) == b"secret"
    with pytest.raises(KeyRequired):
        qcow2x.open(path, snapshot="then")
    assert_clean(path)


def test_data_in_a_file_of_its_own(tmp_path):
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 2 * MiB, encryption=new_encryption(), data_file=str(tmp_path / "data"))
    model = bytearray(2 * MiB)
    with qcow2x.open(path, "r+", key=PASSPHRASE, references="follow") as image:
        write_at_random(image, model, random.Random(8))
    assert qemu_disk(path, tmp_path) == model
    with pytest.raises(ValueError, match="cannot be encrypted"):
        qcow2x.create(path, MiB, encryption=new_encryption(), data_file="data", data_file_raw=True)


@pytest.mark.not_for_qemu("damaged")
def test_header_that_is_cut_off(tmp_path):
    path = keyed(tmp_path)
    whole = path.read_bytes()
    start, nbytes = Header.parse(whole[:65536]).crypto_header
    place = whole.index(struct.pack(">QQ", start, nbytes))
    for length in (1, 591, 592, 4096, nbytes - 258_048 - 1):
        with path.open("r+b") as file:
            file.seek(place + 8)
            file.write(struct.pack(">Q", length))
        with pytest.raises(FormatError):
            qcow2x.open(path, key=PASSPHRASE)


def test_random_damage_ends_in_a_typed_error(tmp_path):
    path = keyed(tmp_path)
    whole = path.read_bytes()
    start = Header.parse(whole[:65536]).crypto_header[0]
    rng = random.Random(5)
    for _ in range(300):
        image = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            # Iterations keep their low bytes: the limit is tested above, patience is not.
            at = rng.choice([at for at in range(592) if at not in (164, 165, 212, 213)])
            image[start + at] = rng.randrange(256)
        path.write_bytes(image)
        try:
            qcow2x.open(path, key="wrong").close()
            pytest.fail("a wrong key was accepted")
        except (KeyRequired, FormatError, CorruptImage):
            pass


@pytest.mark.not_for_qemu("ciphers that only QEMU knows")
@pytest.mark.parametrize("cipher", ["serpent-256", "twofish-256"])
def test_ciphers_other_than_aes_are_refused_by_name(tmp_path, cipher):
    path = tmp_path / "disk.qcow2"
    qemu_create(path, MiB, **{"cipher-alg": cipher})
    with pytest.raises(UnsupportedFeature, match=cipher.split("-")[0]) as caught:
        qcow2x.open(path, key=PASSPHRASE)
    assert caught.value.features == (f"LUKS cipher {cipher.split('-')[0]}-xts-plain64",)


@pytest.mark.parametrize(
    "changed, error",
    [
        ({"format": "rot13"}, ValueError),
        ({"cipher": "serpent-256"}, UnsupportedFeature),
        ({"mode": "ecb"}, UnsupportedFeature),
        ({"ivgen": "benbi"}, UnsupportedFeature),
        ({"hash": "whirlpool"}, UnsupportedFeature),
        ({"ivgen": "essiv", "ivgen_hash": "sha512"}, UnsupportedFeature),
        ({"ivgen_hash": "sha256"}, ValueError),
        ({"cipher": "aes-192", "mode": "cbc"}, ValueError),
        ({"iter_time_ms": 0}, ValueError),
        ({"iter_time_ms": 10**9}, ValueError),
    ],
    ids=str,
)
def test_encryption_that_cannot_be_made(changed, error):
    with pytest.raises(error):
        new_encryption(**changed)


def test_create_without_a_key_leaves_no_file(tmp_path):
    with pytest.raises(KeyRequired):
        qcow2x.create(tmp_path / "x", MiB, encryption=new_encryption(key=lambda name: None))
    assert not os.path.exists(tmp_path / "x")
