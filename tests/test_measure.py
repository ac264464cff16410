"""measure(): what a new image takes, beside QEMU's answer and beside the image itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_helpers import MIB, disk_bytes, qemu_img, qemu_io, write_sparse

import qcow2x
from qcow2x.ops.measure import Measurement


def theirs(*args: object) -> Measurement:
    told = json.loads(qemu_img("measure", "--output=json", *args))
    return Measurement(told["required"], told["fully-allocated"], told.get("bitmaps"))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_sparse(tmp_path / "disk.raw", disk_bytes())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster_size": 512},
        {"cluster_size": 2 * MIB},
        {"compat": "0.10"},
        {"refcount_bits": 1},
        {"refcount_bits": 64, "cluster_size": 4096},
        {"extended_l2": True},
        {"preallocation": "metadata"},
        {"preallocation": "falloc"},
        {"preallocation": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [0, 1, 512, MIB + 512, 10 << 30])
def test_empty_disks_as_qemu_has_them(options: dict[str, object], size: int) -> None:
    words = ",".join(
        f"{name}={'on' if value is True else value}" for name, value in options.items()
    )
    args = ["-o", words] if words else []
    expected = theirs("-O", "qcow2", "--size", size, *args)
    assert qcow2x.measure(size=size, **options) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096}, {"extended_l2": True}], ids=str)
def test_what_is_measured_is_enough(raw: Path, tmp_path: Path, options: dict[str, object]) -> None:
    measured = qcow2x.measure(raw, **options)  # type: ignore[arg-type]
    target = tmp_path / "disk.qcow2"
    qcow2x.convert(raw, target, **options)  # type: ignore[arg-type]
    assert target.stat().st_size <= measured.required < measured.fully_allocated
    words = ",".join(f"{n}={'on' if v is True else v}" for n, v in options.items())
    args = ["-o", words] if words else []
    assert measured == theirs("-O", "qcow2", "-f", "raw", *args, raw)


def test_sources_of_all_kinds(raw: Path, tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    qemu_io(top, "write -P 7 1M 64k", "write -z 128k 512k")
    qemu_img("snapshot", "-c", "before", top)
    qemu_io(top, "write -P 9 0 3M")
    for args, options in (
        ([], {}),
        (["-o", "cluster_size=4k"], {"cluster_size": 4096}),
        (["-o", "cluster_size=1M"], {"cluster_size": MIB}),
        (["-o", f"backing_file={base},backing_fmt=qcow2"], {"backing_file": str(base)}),
        (["-l", "before"], {"snapshot": "before"}),
        (["-o", "compat=0.10"], {"compat": "0.10"}),
    ):
        expected = theirs("-O", "qcow2", "-f", "qcow2", *args, top)
        assert qcow2x.measure(top, references="follow", **options) == expected  # type: ignore[arg-type]
    assert qcow2x.measure(top, references="follow", dst_format="raw") == theirs("-O", "raw", top)
    with qcow2x.open(top, references="follow") as image:
        assert qcow2x.measure(image) == theirs("-O", "qcow2", top)


def test_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2x.create(path, 10 << 30)
    assert qcow2x.measure(path).bitmaps == 0
    qemu_img("bitmap", "--add", "-g", "512", path, "fine")
    qemu_img("bitmap", "--add", "-g", "2M", path, "a coarse one")
    for cluster_size in (512, 65536, 2 * MIB):
        expected = theirs("-O", "qcow2", "-o", f"cluster_size={cluster_size}", path)
        assert expected.bitmaps
        assert qcow2x.measure(path, cluster_size=cluster_size) == expected
    assert qcow2x.measure(path, compat="0.10").bitmaps is None
    assert qcow2x.measure(path, dst_format="raw").bitmaps is None


@pytest.mark.parametrize(("cipher", "header"), [("aes-128", 1052672), ("aes-256", 2068480)])
def test_luks(cipher: str, header: int) -> None:
    encryption = qcow2x.Encryption(key=b"letmein", cipher=cipher)
    total = MIB + 512 + header
    measured = qcow2x.measure(size=MIB + 512, dst_format="luks", encryption=encryption)
    assert measured == Measurement(total, total)
    for cluster_size in (512, 65536):
        plain = qcow2x.measure(size=MIB, cluster_size=cluster_size)
        area = -(-header // cluster_size) * cluster_size
        assert qcow2x.measure(
            size=MIB, cluster_size=cluster_size, encryption=encryption
        ) == Measurement(plain.required + area, plain.fully_allocated + area)
    weak = qcow2x.Encryption(key=b"letmein", format="aes")
    assert qcow2x.measure(size=MIB, encryption=weak) == qcow2x.measure(size=MIB)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either"),
        ({"src": "x", "size": 1}, "either"),
        ({"size": 1, "dst_format": "vmdk"}, "Unknown file format"),
        ({"size": 1, "dst_format": "luks"}, "encryption"),
        ({"size": 1, "cluster_size": 1000}, "Cluster size"),
        ({"size": 1, "preallocation": "some"}, "preallocation"),
        ({"size": 1 << 62}, "too large"),
        ({"size": 1, "compat": "0.10", "extended_l2": True}, "compatibility level"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qcow2x.measure(**options)  # type: ignore[arg-type]
