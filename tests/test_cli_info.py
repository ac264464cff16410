"""info and map: the same words as qemu-img on the same images.

QEMU 7.2 prints less than 10.0 does: no child nodes in info, no "compressed" in map. Those are taken
out of our text, or out of the comparison, where 7.2 is the one to compare with.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_helpers import disk_bytes, qemu_img, qemu_io, run, write_sparse

CREATE_OPTIONS = [
    [],
    ["-o", "compat=0.10,cluster_size=4k"],
    ["-o", "compression_type=zstd,extended_l2=on,lazy_refcounts=on,refcount_bits=8"],
    ["-o", "cluster_size=2M,refcount_bits=64"],
    ["-o", "preallocation=metadata"],
]


def without_children(value: object) -> object:
    if isinstance(value, dict):
        return {k: without_children(v) for k, v in value.items() if k != "children"}
    if isinstance(value, list):
        return [without_children(item) for item in value]
    return value


def as_7_2(text: str) -> str:
    return re.sub(r"Child node '/file':\n(    .*\n)+", "", text)


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """raw <- compressed <- top, by relative names."""
    monkeypatch.chdir(tmp_path)
    write_sparse(tmp_path / "disk.raw", disk_bytes())
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "base.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "6M")
    qemu_io("top.qcow2", "write 64k 64k", "write -z 256k 64k", "write -z -u 512k 100k",
            "write 5M 64k", "write 5888k 3k")  # fmt: skip
    return ["top.qcow2", "base.qcow2", "disk.raw"]


@pytest.mark.parametrize("options", CREATE_OPTIONS, ids=lambda o: o[-1] if o else "default")
def test_info(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "an image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *options, image, "10M")
    assert run("info", image) == 0
    assert as_7_2(capsys.readouterr().out) == qemu_img("info", image)
    assert run("info", "--output=json", image) == 0
    ours = capsys.readouterr().out
    theirs = qemu_img("info", "--output=json", image)
    assert without_children(json.loads(ours)) == json.loads(theirs)
    kept = [line for line in ours.splitlines() if not line.startswith("        ")]
    assert "\n".join(kept).startswith('{\n    "children": [\n    ],')
    # QEMU prints the members in the order of its hash table: they come in that order here too.
    assert [k for k in json.loads(ours) if k != "children"] == list(json.loads(theirs))
    for level in ("format-specific",):
        assert list(json.loads(ours)[level]["data"]) == list(json.loads(theirs)[level]["data"])


def test_info_of_a_chain(chain: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["top.qcow2"], ["--backing-chain", "top.qcow2"], ["disk.raw"]):
        assert run("info", *args) == 0
        assert as_7_2(capsys.readouterr().out) == qemu_img("info", *args), args
        assert run("info", "--output=json", *args) == 0
        ours = json.loads(capsys.readouterr().out)
        assert without_children(ours) == json.loads(qemu_img("info", "--output=json", *args))


def test_info_of_a_child_node(chain: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run("info", "disk.raw")
    size = Path("disk.raw").stat().st_size
    assert capsys.readouterr().out.splitlines()[-5:-1] == [
        "Child node '/file':",
        "    filename: disk.raw",
        "    protocol type: file",
        f"    file length: 3.06 MiB ({size} bytes)",
    ]
    run("info", "--output=json", "top.qcow2")
    (child,) = json.loads(capsys.readouterr().out)["children"]
    assert child["name"] == "file"
    assert child["info"]["format"] == "file"
    assert child["info"]["virtual-size"] == -(-Path("top.qcow2").stat().st_size // 512) * 512


def test_info_from_elsewhere_gives_the_actual_path(
    chain: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "top.qcow2"
    run("info", "--backing-chain", image)
    assert as_7_2(capsys.readouterr().out) == qemu_img("info", "--backing-chain", image)


def test_info_opens_no_backing_file_unless_asked(
    chain: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("base.qcow2").unlink()
    assert run("info", "top.qcow2") == 0
    capsys.readouterr()
    assert run("info", "--backing-chain", "top.qcow2") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "base.qcow2" in captured.err


@pytest.mark.not_for_qemu("a chain without end")
def test_info_of_a_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.qcow2", tmp_path / "two.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", two, "-F", "qcow2", one, "1M")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", one, "-F", "qcow2", two, "1M")
    assert run("info", "--backing-chain", one) == 1
    assert "infinite loop" in capsys.readouterr().err


def test_info_refuses_what_is_no_qcow2(chain: list[str]) -> None:
    assert run("info", "-f", "qcow2", "disk.raw") == 1
    assert run("info", "-f", "raw", "base.qcow2") == 0


def entries(text: str) -> list[dict[str, object]]:
    found = json.loads(text)
    for entry in found:
        entry.pop("compressed", None)
    return list(found)


@pytest.mark.parametrize(
    "window", [[], ["--start-offset=64k", "--max-length=100k"], ["--start-offset", "5M"]], ids=str
)
def test_map(chain: list[str], window: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for image in chain:
        assert run("map", "--output=json", *window, image) == 0
        ours = capsys.readouterr().out
        assert entries(ours) == entries(qemu_img("map", "--output=json", *window, image))
        assert ours.count("\n") == len(json.loads(ours))


def test_map_of_compressed_clusters(chain: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run("map", "--output=json", "base.qcow2")
    compressed = [e for e in json.loads(capsys.readouterr().out) if e["compressed"]]
    assert compressed
    assert all("offset" not in e for e in compressed)


def test_map_for_people(chain: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("map", "disk.raw") == 0
    assert capsys.readouterr().out == qemu_img("map", "-f", "raw", "disk.raw")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "disk.raw", "base.qcow2")
    assert run("map", "top.qcow2") == 0
    assert capsys.readouterr().out == qemu_img("map", "top.qcow2")


def test_map_for_people_cannot_show_compressed_clusters(chain: list[str]) -> None:
    assert run("map", "base.qcow2") == 1


@pytest.mark.parametrize("options", ["", ",cluster_size=4k"])
def test_map_of_a_preallocated_image(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "laid-out.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"preallocation=metadata{options}", image, "10M")
    qemu_io(image, "write 1M 300k")
    assert run("map", "--output=json", image) == 0
    assert entries(capsys.readouterr().out) == entries(qemu_img("map", "--output=json", image))
