"""amend: every change both ways, with the disk the same before and after, as qemu-img sees it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from support.qemu import check_clean, qemu_img, qemu_io

import qcow2x

SIZE = 3 << 20


def specific(path: Path) -> dict[str, object]:
    told = json.loads(qemu_img("info", "--output=json", path))
    data = told["format-specific"]["data"]
    assert isinstance(data, dict)
    return data


def filled(path: Path, **options: object) -> bytearray:
    qcow2x.create(path, SIZE, **options)  # type: ignore[arg-type]
    rnd, model = random.Random(7), bytearray(SIZE)
    with qcow2x.open(path, "r+", references="follow") as image:
        for _ in range(40):
            offset = rnd.randrange(SIZE)
            length = min(rnd.choice([100, 5000, 70000]), SIZE - offset)
            data = rnd.randbytes(length)
            image.pwrite(data, offset)
            model[offset : offset + length] = data
        image.write_zeroes(SIZE // 2, 200_000)
        model[SIZE // 2 : SIZE // 2 + 200_000] = bytes(200_000)
    return model


def holds(path: Path, model: bytes) -> None:
    check_clean(path)
    with qcow2x.open(path, references="follow") as image:
        assert image.check().clean
        assert image.pread(SIZE, 0) == model
    qemu_io(path, "read 0 3M")


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_every_refcount_width_after_another(tmp_path: Path, cluster_size: int) -> None:
    path = tmp_path / "disk.qcow2"
    model = filled(path, cluster_size=cluster_size)
    for bits in (64, 1, 8, 2, 32, 4, 16):
        qcow2x.amend(path, refcount_bits=bits)
        assert specific(path)["refcount-bits"] == bits
        holds(path, model)
        with qcow2x.open(path, "r+") as image:
            image.pwrite(b"after", 12345)
        model[12345:12350] = b"after"
    holds(path, model)


def test_a_refcount_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    model = filled(path)
    with qcow2x.open(path, "r+") as image:
        image.snapshots.create("s")
    with pytest.raises(
        qcow2x.UnsupportedFeature, match=r"Cluster at offset 0x\w+ has a refcount of 2"
    ):
        qcow2x.amend(path, refcount_bits=1)
    holds(path, model)
    qcow2x.amend(path, refcount_bits=2)
    holds(path, model)
    with qcow2x.open(path, snapshot="s") as then:
        assert then.pread(SIZE, 0) == model


@pytest.mark.parametrize("backed", [False, True])
def test_down_to_version_2_and_up_again(tmp_path: Path, backed: bool) -> None:
    path, base = tmp_path / "disk.qcow2", tmp_path / "base.raw"
    options = {}
    if backed:
        base.write_bytes(b"\xaa" * SIZE)
        options = {"backing_file": str(base), "backing_format": "raw"}
    filled(path, **options)
    with qcow2x.open(path, references="follow") as image:
        model = bytearray(image.pread(SIZE, 0))
    qcow2x.amend(path, compat="0.10", references="follow")
    assert specific(path)["compat"] == "0.10"
    holds(path, model)
    qcow2x.amend(path, compat="1.1", lazy_refcounts=True, references="follow")
    assert specific(path)["compat"] == "1.1" and specific(path)["lazy-refcounts"] is True
    holds(path, model)
    qcow2x.amend(path, compat="1.1", refcount_bits=64, lazy_refcounts=False, references="follow")
    assert specific(path)["refcount-bits"] == 64
    holds(path, model)


@pytest.mark.parametrize("backed", [False, True])
def test_zero_flags_of_snapshots_go_away(tmp_path: Path, backed: bool) -> None:
    """Plain ones, ones over clusters, in tables that snapshots share, and one over a cluster that
    another snapshot has data in."""
    path, base = tmp_path / "disk.qcow2", tmp_path / "base.raw"
    options: dict[str, object] = {"cluster_size": 4096}
    if backed:
        base.write_bytes(b"\xaa" * SIZE)
        options |= {"backing_file": str(base), "backing_format": "raw"}
    filled(path, **options)
    qemu_img("snapshot", "-c", "data", path)
    qemu_io(path, "write -z 0 1M")
    for name in ("zeros", "same"):
        qemu_img("snapshot", "-c", name, path)
    qemu_io(path, "write -P 7 4k 300k", "write -z 8k 4k", "write -z 2M 64k")
    with qcow2x.open(path, references="follow") as image:
        disks = {one.name: image.snapshots.open(one.id).pread(SIZE, 0) for one in image.snapshots}
        disks[""] = image.pread(SIZE, 0)
    seen: list[float] = []
    with qcow2x.open(path, "r+", references="follow") as image:
        qcow2x.amend(image, compat="0.10", progress=lambda d, t, _: seen.append(d / t))
        assert image.pread(SIZE, 0) == disks[""]
        image.pwrite(b"on", 0)
        image.pwrite(disks[""][:2], 0)
    assert seen == sorted(seen) and seen[-1] == 1 and len(seen) > 4
    holds(path, disks[""])
    for name in ("data", "zeros", "same"):
        qemu_img("snapshot", "-a", name, path)
        holds(path, disks[name])


def test_a_size_is_set_before_snapshots_are_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    filled(path)
    with qcow2x.open(path, "r+") as image:
        image.snapshots.create("s")
        image.resize(SIZE + 65536)
    with pytest.raises(qcow2x.UnsupportedFeature, match="snapshots prevent downgrade"):
        qcow2x.amend(path, compat="0.10")
    qcow2x.amend(path, compat="0.10", size=SIZE)
    assert specific(path)["compat"] == "0.10"


@pytest.mark.parametrize(
    "options,reason",
    [
        ({"extended_l2": True}, "incompatible features 0x10 set"),
        ({"compression_type": "zstd"}, "zstd compression type"),
        ({"refcount_bits": 8}, "requires refcount_bits=16"),
    ],
)
def test_what_version_2_cannot_say_is_named(
    tmp_path: Path, options: dict[str, object], reason: str
) -> None:
    path = tmp_path / "disk.qcow2"
    model = filled(path, **options)
    if "compression_type" in options:
        with qcow2x.open(path, "r+") as image:
            image.pwrite_compressed(bytes(65536), 0)
        model[:65536] = bytes(65536)
    with pytest.raises(qcow2x.UnsupportedFeature, match=reason):
        qcow2x.amend(path, compat="0.10")
    holds(path, model)


def test_zstd_that_nothing_was_compressed_with_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    model = filled(path, compression_type="zstd", lazy_refcounts=True)
    qcow2x.amend(path, compat="0.10")
    assert specific(path)["compression-type"] == "zlib"
    holds(path, model)


def test_snapshots_of_version_2_get_the_fields_of_version_3(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    model = filled(path, compat="0.10")
    with qcow2x.open(path, "r+") as image:
        image.snapshots.create("s")
        # As a writer of old left it.
        at = image._header.snapshots_offset
        entry = bytearray(image._file.pread(66, at))
        entry[36:40] = bytes(4)
        del entry[40:64]
        image._file.pwrite(bytes(entry).ljust(66, b"\0"), at)
    qcow2x.amend(path, compat="1.1")
    with qcow2x.open(path) as image:
        (snapshot,) = image.snapshots
        assert (snapshot.name, snapshot.extra_size, snapshot.icount) == ("s", 24, None)
        assert image.check().clean
    holds(path, model)


def test_size_and_steps(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    model = filled(path)
    seen: list[tuple[int, int]] = []
    qcow2x.amend(
        path, refcount_bits=32, size=SIZE + 65536, progress=lambda d, t, _: seen.append((d, t))
    )
    assert seen == [(1, 1)]
    with qcow2x.open(path) as image:
        assert image.size == SIZE + 65536
        assert image.pread(SIZE, 0) == model


def test_a_data_file_gets_a_new_name(tmp_path: Path) -> None:
    path, old, new = tmp_path / "disk.qcow2", tmp_path / "old.raw", tmp_path / "new.raw"
    model = filled(path, data_file=old)
    old.rename(new)
    qcow2x.amend(path, data_file=new, references=lambda reference: new)
    holds(path, model)


def test_bad_arguments(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, SIZE)
    for wrong in ({"compat": "2"}, {"refcount_bits": 3}, {"data_file": "x"}):
        with pytest.raises(ValueError):
            qcow2x.amend(path, **wrong)  # type: ignore[arg-type]
    with qcow2x.open(path) as image, pytest.raises(PermissionError):
        qcow2x.amend(image, lazy_refcounts=True)


def test_key_slots_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made = qcow2x.Encryption(key="first", iter_time_ms=10)
    qcow2x.create(path, SIZE, encryption=made)
    with qcow2x.open(path, "r+", key="first") as image:
        image.pwrite(b"secret", 0)
    qcow2x.amend(path, key="first", new_key="second", iter_time_ms=10)
    qcow2x.amend(path, key="second", erase_key="first")
    with pytest.raises(qcow2x.KeyRequired):
        qcow2x.open(path, key="first")
    with pytest.raises(ValueError, match="refusing"):
        qcow2x.amend(path, key="second", erase_slot=1)
    with qcow2x.open(path, "r+", key="second") as image:
        assert image.pread(6, 0) == b"secret"
        qcow2x.amend(image, key="second", new_key=b"third", key_slot=5, iter_time_ms=10)
    secret = ["--object", "secret,id=s,data=third", "--image-opts"]
    opts = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename={path}"
    qemu_img("check", *secret, opts)
    assert '"active": true' in qemu_img("info", "--output=json", *secret, opts)
    qemu_img("convert", *secret, opts, "-O", "raw", tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes()[:6] == b"secret"
    plain = tmp_path / "plain.qcow2"
    qcow2x.create(plain, SIZE)
    with pytest.raises(ValueError, match="encryption not present"):
        qcow2x.amend(plain, new_key="x")
