"""check: the verdict, words and exit status of qemu-img on the same images."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import MIB, disk_bytes, qemu, qemu_img, qemu_io, run, write_sparse
from test_repair import PLAIN, Raw, make_plain


def test_check_of_clean_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sparse(tmp_path / "disk.raw", disk_bytes())
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "base.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    qemu_io("top.qcow2", "write 64k 64k", "write -z 256k 64k", "write 1M 3k")
    for image in ("disk.raw", "base.qcow2", "top.qcow2"):
        for args in ([image], ["-q", image], ["--output=json", image]):
            theirs = qemu("qemu-img", "check", *args, ok=(0, 63))
            assert run("check", *args) == theirs.returncode
            assert capsys.readouterr().out == theirs.stdout


def leaky(path: Path) -> Path:
    """An image whose first L2 entry was lost: one cluster leaks."""
    qemu_img("create", "-q", "-f", "qcow2", path, MIB)
    qemu_io(path, "write 0 192k")
    with open(path, "r+b") as image:
        image.seek(40)
        l1 = int.from_bytes(image.read(8), "big")
        image.seek(l1)
        l2 = int.from_bytes(image.read(8), "big") & ~(1 << 63)
        image.seek(l2)
        image.write(bytes(8))
    return path


def test_check_reports_and_repairs_leaks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = leaky(tmp_path / "leaky.qcow2")
    for args in ([image], ["--output=json", image]):
        theirs = qemu("qemu-img", "check", *args, ok=(3,))
        assert run("check", *args) == 3
        assert capsys.readouterr().out == theirs.stdout
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(image.read_bytes())
    theirs = qemu("qemu-img", "check", "-r", "leaks", copy)
    assert run("check", "-r", "leaks", image) == 0
    assert capsys.readouterr().out == theirs.stdout
    assert qemu_img("check", image).startswith("No errors")


@pytest.mark.not_for_qemu("damaged")
def test_check_reports_corruption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = leaky(tmp_path / "bad.qcow2")
    with open(image, "r+b") as out:
        out.seek(40)
        l1 = int.from_bytes(out.read(8), "big")
        out.seek(l1)
        l2 = int.from_bytes(out.read(8), "big") & ~(1 << 63)
        out.seek(l2 + 16)
        entry = out.read(8)
        out.seek(l2 + 8)
        out.write(entry)
    theirs = qemu("qemu-img", "check", "--output=json", image, ok=(2,))
    assert run("check", "--output=json", image) == 2
    assert capsys.readouterr().out == theirs.stdout
    assert run("check", image) == 2
    captured = capsys.readouterr()
    assert captured.out == qemu("qemu-img", "check", image, ok=(2,)).stdout
    assert captured.err


# Damage of which the whole answer is qemu-img's, to the byte.
SAME_WORDS = [
    "L1 twice the same table",
    "data twice",
    "data entry lost",
    "data without COPIED",
    "refcount 2",
    "refcount largest",
    "corrupt bit",
    "dirty bit",
]


@pytest.mark.parametrize("name", SAME_WORDS)
def test_repair_of_all_answers_as_qemu_img(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    image, copy = tmp_path / "bad.qcow2", tmp_path / "copy.qcow2"
    make_plain(image)
    raw = Raw(image)
    PLAIN[name](raw)
    raw.save()
    copy.write_bytes(raw.bytes)
    theirs = qemu("qemu-img", "check", "-r", "all", copy, ok=(0, 2))
    assert run("check", "-r", "all", image) == theirs.returncode
    assert capsys.readouterr().out == theirs.stdout


def test_repair_keeps_and_names_what_undoes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = leaky(tmp_path / "leaky.qcow2")
    before = image.read_bytes()
    assert run("check", "-r", "all", "--dry-run", image) == 3
    assert "lower the refcount" in capsys.readouterr().err
    assert image.read_bytes() == before and list(tmp_path.iterdir()) == [image]
    assert run("check", "-r", "all", image) == 0
    journal = tmp_path / "leaky.qcow2.qcow2x-undo"
    assert f"qcow2x check --undo {journal} {image}" in capsys.readouterr().err
    assert image.read_bytes() != before
    assert run("check", "--undo", journal, image) == 0
    assert image.read_bytes() == before
    # The first journal stays; the next one gets a name of its own.
    assert run("check", "-q", "-r", "all", image) == 0
    assert (tmp_path / "leaky.qcow2.qcow2x-undo.1").exists()
    # A sound image needs none, and who wants none gets none.
    assert run("check", "-q", "-r", "all", image) == 0
    other = leaky(tmp_path / "other.qcow2")
    assert run("check", "-q", "-r", "all", "--no-journal", other) == 0
    assert len([path for path in tmp_path.iterdir() if "undo" in path.name]) == 2


@pytest.mark.leaks("made so")
def test_undo_needs_a_journal_of_this_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = leaky(tmp_path / "leaky.qcow2")
    assert run("check", "--undo", image, image) == 1
    assert "no undo journal" in capsys.readouterr().err
    assert run("check", "--dry-run", image) == 1
    assert "go with -r" in capsys.readouterr().err
