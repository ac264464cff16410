"""The graph of block drivers: names, options, children, and what is said when something is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import qcow2x
from qcow2x.cli import words
from qcow2x.drivers import OptionError, open_node
from qcow2x.drivers.options import flatten, parse_json_name, parse_option_string


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(target: object, **options: object) -> str:
    with pytest.raises(Exception) as caught:
        open_node(target, **options).close()  # type: ignore[arg-type]
    return words.opening(caught.value, str(target))


def test_option_strings() -> None:
    assert parse_option_string("driver=raw,file.filename=a,,b,x=") == {
        "driver": "raw",
        "file.filename": "a,b",
        "x": "",
    }
    assert parse_option_string("one,nolock,b=c=d", "first") == {
        "first": "one",
        "lock": "off",
        "b": "c=d",
    }


def test_json_names() -> None:
    assert parse_json_name("""json:{'a': {"b": [1, 'it\\'s "x"']}, "c": null}""") == {
        "a.b.0": 1,
        "a.b.1": 'it\'s "x"',
        "c": None,
    }
    with pytest.raises(OptionError, match="Invalid JSON object given"):
        parse_json_name("json:[]")
    with pytest.raises(OptionError, match="Could not parse the JSON options: JSON parse error"):
        parse_json_name("json:{")
    assert flatten({"a": {}, "b": []}) == {"a": {}, "b": []}


def test_plain_names(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    qcow2x.create("b", 1 << 20, backing_file="a", backing_format="qcow2")
    with open_node("b") as node:
        assert [n.filename for n in node.chain] == ["b", "a"]
        assert list(node.children) == ["file", "backing"]
        assert node.image is not None and node.storage is node.image
        assert node.file is not None and node.file.driver == "file"
    # Saying outright what the image says itself changes nothing.
    spec = "driver=qcow2,file.filename=b,backing.driver=qcow2,backing.file.filename=a"
    with open_node(spec, image_opts=True) as node:
        assert node.filename == "b"
    with open_node("file:b") as node:
        assert node.filename == "b"


def test_names_that_need_json(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    qcow2x.create("b", 1 << 20, backing_file="a", backing_format="qcow2")
    file = '{"driver": "file", "filename": "b"}'
    with open_node({"driver": "qcow2", "file": {"filename": "b"}, "backing": None}) as node:
        assert node.filename == f'json:{{"backing": null, "driver": "qcow2", "file": {file}}}'
        assert node.pread(10, 0) == bytes(10)
    Path("r").write_bytes(bytes(range(256)) * 8)
    with open_node("driver=raw,offset=512,size=1k,file.filename=r", image_opts=True) as node:
        assert node.filename == (
            'json:{"offset": "512", "driver": "raw", "size": "1k", '
            '"file": {"driver": "file", "filename": "r"}}'
        )
        assert node.size == 1024 and node.pread(2, 1) == b"\1\2"
        inner = node.filename
    with open_node(inner) as node:
        assert node.filename == inner
    with open_node("json:{'driver': 'null-co', 'read-zeroes': true, 'size': 4096}") as node:
        assert node.filename == 'json:{"read-zeroes": true, "driver": "null-co", "size": 4096}'


def test_raw_ends_inside_a_sector(folder: Path) -> None:
    Path("r").write_bytes(b"x" * 1000)
    with open_node("r", format="raw", writable=True) as node:
        assert node.size == 1024
        assert node.pread(2000, 990) == b"x" * 10 + bytes(24)
        assert sum(run.length for run in node.extents()) == 1024
        with pytest.raises(OSError):
            node.pwrite(b"y", 1024)
        node.pwrite(b"y", 1023)
    assert os.path.getsize("r") == 1024


def test_what_is_wrong(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    qcow2x.create("c", 1 << 20, backing_file="none", backing_format="qcow2")
    none = "No such file or directory"
    assert said("none") == f"Could not open 'none': Could not open 'none': {none}"
    assert said("c") == (
        f"Could not open 'c': Could not open backing file: Could not open 'none': {none}"
    )
    assert said("a", format="no") == "Could not open 'a': Unknown driver 'no'"
    assert said("no:a") == "Could not open 'no:a': Unknown protocol 'no'"
    assert said("driver=raw,file.filename=a,x=1", image_opts=True).endswith(
        "Block format 'raw' does not support the option 'x'"
    )
    assert said("driver=raw,file.filename=a,file.x=1", image_opts=True).endswith(
        "Block protocol 'file' doesn't support the option 'x'"
    )
    assert said("driver=raw", image_opts=True).endswith(
        'A block device must be specified for "file"'
    )
    assert said("driver=file", image_opts=True).endswith(
        "The 'file' block driver requires a file name"
    )
    assert said("a", options={"read-only": "maybe"}).endswith(
        "Parameter 'read-only' expects 'on' or 'off'"
    )
    assert said("json:{'driver':'raw','file.filename':'a','size':'x'}").endswith(
        "Parameter 'size' expects a non-negative number below 2^64\n"
        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
        "and exabytes, respectively."
    )


def test_a_known_format_without_driver_is_no_raw_disk(folder: Path) -> None:
    Path("v").write_bytes(b"KDMV" + bytes(2044))
    assert said("v") == "Could not open 'v': Unknown driver 'vmdk'"
    with open_node("v", format="raw") as node:
        assert node.pread(4, 0) == b"KDMV"


def test_locks(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    with open_node("a", writable=True):
        assert said("a") == (
            "Could not open 'a': Failed to get shared \"write\" lock\n"
            "Is another process using the image [a]?"
        )
        assert 'Failed to get "write" lock' in said("a", writable=True)
        open_node("a", force_share=True).close()
        open_node("driver=file,locking=off,filename=a", image_opts=True).close()
    assert "force-share=on can only be used with read-only images" in said(
        "a", writable=True, force_share=True
    )
    with open_node("a"), open_node("a"):
        assert 'Failed to get shared "write" lock' not in said("a", writable=True)


def test_zeros_detected_and_discards_ignored(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    with open_node("a", writable=True, detect_zeroes="on", discard=False) as node:
        node.pwrite(b"x" * 131072, 0)
        node.pwrite(bytes(65536), 0)
        node.discard(65536, 65536)
        assert [run.zero for run in node.extents(0, 131072)] == [True, False]
    assert "not allowed without setting discard operation to unmap" in said(
        "a", discard=False, detect_zeroes="unmap"
    )


def test_only_looking_needs_no_key_and_no_backing_file(folder: Path) -> None:
    qcow2x.create("a", 1 << 20, encryption=qcow2x.Encryption(key=b"k", iter_time_ms=10))
    qcow2x.create("c", 1 << 20, backing_file="none", backing_format="qcow2")
    with open_node("a", io=False) as node:
        assert node.size == 1 << 20 and node.image is None
    with open_node("c", io=False, backing=False) as node:
        assert node.filename == "c" and node.full_backing_filename == "none"
    with open_node("c", backing=False) as node, pytest.raises(qcow2x.ReferenceDenied):
        node.pread(1, 0)


@pytest.mark.not_for_qemu("a chain without end")
def test_a_chain_in_a_circle(folder: Path) -> None:
    qcow2x.create("a", 1 << 20, backing_file="b", backing_format="qcow2")
    qcow2x.create("b", 1 << 20, backing_file="a", backing_format="qcow2")
    assert "is part of its own backing chain" in said("a")


def test_relative_names_count_from_the_image(folder: Path) -> None:
    (folder / "d").mkdir()
    qcow2x.create("d/a", 1 << 20)
    qcow2x.create("d/b", 1 << 20, backing_file="a", backing_format="qcow2")
    with open_node("d/b") as node:
        assert [n.filename for n in node.chain] == ["d/b", "d/a"]
    with open_node({"driver": "qcow2", "file": {"driver": "file", "filename": "d/b"}}) as node:
        assert node.filename == "d/b"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (
            "cache-size=1M,l2-cache-size=64k,refcount-cache-size=64k",
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        ("cache-size=1M,l2-cache-size=2M", "l2-cache-size may not exceed cache-size"),
        ("cache-size=1M,refcount-cache-size=2M", "refcount-cache-size may not exceed cache-size"),
        (
            "l2-cache-entry-size=33k",
            "L2 cache entry size must be a power of two between 512 and the cluster size (65536)",
        ),
        ("refcount-cache-size=256T", "Refcount cache size too big"),
        ("cache-clean-interval=-1", "Cache clean interval too big"),
        ("lazy-refcounts=42", "Parameter 'lazy-refcounts' expects 'on' or 'off'"),
        (
            "overlap-check=constant,overlap-check.template=all",
            "Conflicting values for qcow2 options 'overlap-check' ('constant') and "
            "'overlap-check.template' ('all')",
        ),
        (
            "overlap-check=blubb",
            "Unsupported value 'blubb' for qcow2 option 'overlap-check'. Allowed are any of the "
            "following: none, constant, cached, all",
        ),
        (
            "encrypt.format=luks",
            "No encryption in image header, but options specified format 'luks'",
        ),
        (
            "data-file.filename=x",
            "'data-file' can only be set for images with an external data file",
        ),
    ],
)
def test_qcow2_options_refused(folder: Path, option: str, text: str) -> None:
    qcow2x.create("a", 1 << 20)
    assert said(f"driver=qcow2,file.filename=a,{option}", image_opts=True).endswith(": " + text)


@pytest.mark.parametrize(
    "option",
    [
        "cache-size=0",
        "l2-cache-size=0",
        "cache-size=2M,refcount-cache-size=1M",
        "l2-cache-entry-size=512",
        "overlap-check.inactive-l2=on",
        "overlap-check.template=none",
        "pass-discard-request=off,pass-discard-other=on,lazy-refcounts=on",
    ],
)
def test_qcow2_options_taken(folder: Path, option: str) -> None:
    qcow2x.create("a", 1 << 20)
    spec = f"driver=qcow2,file.filename=a,{option}"
    with open_node(spec, image_opts=True, writable=True) as node:
        node.pwrite(b"x" * 70000, 1000)
        node.discard(0, 65536)
        assert node.pread(4, 70996) == b"xxxx" and node.filename == "a"
    assert qcow2x.check("a").clean


def test_keys(folder: Path) -> None:
    qcow2x.create("a", 1 << 20, encryption=qcow2x.Encryption(key=b"k", iter_time_ms=10))
    spec = "driver=qcow2,file.filename=a,encrypt.key-secret=s"
    with open_node(spec, image_opts=True, secrets={"s": b"k"}) as node:
        assert node.pread(4, 0) == bytes(4)
        assert node.filename == (
            'json:{"encrypt.key-secret": "s", "driver": "qcow2", '
            '"file": {"driver": "file", "filename": "a"}}'
        )
    assert said("a").endswith("Parameter 'encrypt.key-secret' is required for cipher")
    assert said(spec, image_opts=True).endswith("No secret with id 's'")
    assert said(spec, image_opts=True, secrets={"s": b"x"}).endswith(
        "Invalid password, cannot unlock any keyslot"
    )


@pytest.mark.not_for_qemu("damaged")
def test_what_is_wrong_with_an_image(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    header = bytearray(Path("a").read_bytes())
    header[72 + 0] |= 0x80  # incompatible feature bit 63
    Path("b").write_bytes(header)
    assert said("b").endswith(
        "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000000"
    )
    Path("c").write_bytes(b"x" * 65536)
    assert said("c", format="qcow2").endswith(": Image is not in qcow2 format")


def test_copy_on_read(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    with open_node("a", writable=True) as node:
        node.pwrite(b"x" * 1000, 70000)
    qcow2x.create("b", 1 << 20, backing_file="a", backing_format="qcow2")

    def held() -> list[tuple[int, int, bool]]:
        with open_node("b") as node:
            runs = node.extents()
            return [(r.offset, r.length, r.zero) for r in runs if r.allocated and not r.depth]

    with open_node("b", writable=True, copy_on_read=True) as node:
        assert node.pread(2, 70000) == b"xx"
    assert held() == [(65536, 65536, False)]
    spec = "driver=copy-on-read,file.driver=qcow2,file.file.filename=b"
    with open_node(spec, image_opts=True, writable=True) as node:
        assert node.pread(4, 200000) == bytes(4)
        node.pwrite(b"y", 65535)
        assert node.pread(4465, 65535) == b"y" + bytes(4464)
    assert held() == [(0, 65536, False), (65536, 65536, False), (196608, 65536, True)]
    assert said("b", copy_on_read=True).endswith("Can't use copy-on-read on read-only device")
    assert said(spec, image_opts=True).endswith("Block node is read-only")
    assert qcow2x.check("b").clean


def test_compress(folder: Path) -> None:
    qcow2x.create("a", (1 << 20) + 512)
    with open_node("a", writable=True) as node:
        node.pwrite(b"x" * (1 << 20), 512)
    spec = "driver=compress,file.driver=qcow2,file.file.filename=a"
    with open_node(spec, image_opts=True, writable=True) as node:
        node.pwrite(b"y" * 65536, 65536)
        node.pwrite(b"z" * 10, 200000)
        node.pwrite(b"w" * 100, (1 << 20) + 400)
        assert [(r.offset, r.length) for r in node.extents() if r.compressed] == [
            (65536, 65536),
            (196608, 65536),
            (1048576, 512),
        ]
        assert node.pread(12, 199999) == b"x" + b"z" * 10 + b"x"
        assert node.pread(200, 1 << 20) == b"x" * 200
    spec = "driver=compress,file.driver=raw,file.file.filename=a"
    assert said(spec, image_opts=True).endswith(
        "Compression is not supported for underlying format: raw"
    )


def test_a_guessed_raw_disk_stays_one(folder: Path) -> None:
    Path("r").write_bytes(bytes(4096))
    with open_node("r", writable=True) as node:
        node.pwrite(b"QFI", 0)
        with pytest.raises(PermissionError):
            node.pwrite(b"\xfb\0\0\0\3", 3)
        node.pwrite(b"x", 4)
    with open_node("r", format="raw", writable=True) as node:
        node.pwrite(b"QFI\xfb\0\0\0\3", 0)
        node.pwrite(bytes(8), 0)


@pytest.fixture(scope="module")
def qemu_img() -> str:
    import shutil

    return shutil.which("qemu-img") or pytest.skip("no qemu-img here")


def test_luks(folder: Path, qemu_img: str) -> None:
    import subprocess

    from qcow2x.ops.newfile import create_luks

    create_luks("a", 1 << 20, qcow2x.Encryption(key=b"key", iter_time_ms=10))
    spec = "driver=luks,key-secret=s,file.filename=a"
    content = bytearray(1 << 20)
    with open_node(spec, image_opts=True, secrets={"s": b"key"}, writable=True) as node:
        assert node.size == 1 << 20
        node.pwrite(bytes(1 << 20), 0)
        for at, nbytes in ((0, 1), (511, 2), (1000, 300_001), (1023 * 1024 + 5, 700)):
            node.pwrite(b"x" * nbytes, at)
            content[at : at + nbytes] = b"x" * nbytes
        assert node.pread(1 << 20, 0) == content
        assert node.pread(700, 900_001) == content[900_001:900_701]
    convert = [qemu_img, "convert", "--object", "secret,id=s,data=key", "--image-opts", spec]
    subprocess.run([*convert, "-O", "raw", "out"], check=True)
    assert Path("out").read_bytes() == content
    assert said("a") == "Could not open 'a': Parameter 'key-secret' is required for cipher"
    assert "Invalid password, cannot unlock any keyslot" in said(
        spec, image_opts=True, secrets={"s": b"other"}
    )
    with open_node("a", io=False) as node:
        assert node.driver == "luks" and node.size == 1 << 20


def test_an_image_in_an_image(folder: Path) -> None:
    qcow2x.create("outer", 1 << 22)
    qcow2x.create("inner", 1 << 20)
    with open_node("inner", writable=True) as node:
        node.pwrite(b"x" * 1000, 500)
    with open_node("outer", writable=True) as node:
        node.pwrite(Path("inner").read_bytes(), 0)
    nested = {"driver": "qcow2", "file": {"driver": "qcow2", "file": {"filename": "outer"}}}
    with open_node(nested, writable=True) as node:
        assert node.pread(1002, 499) == b"\0" + b"x" * 1000 + b"\0"
        node.pwrite(b"y" * 70000, 300_000)
        assert node.pread(2, 369_999) == b"y\0"
    window = {"driver": "raw", "offset": 0, "size": 1024, "file": nested["file"]}
    with open_node(window) as node:
        assert node.pread(4, 0) == b"QFI\xfb" and node.size == 1024


def test_options_of_a_node_opened_again(folder: Path) -> None:
    qcow2x.create("a", 1 << 20)
    with open_node("a") as node:
        assert node.join_options({"x": 1}, {"y": 2}) == {"x": 1, "y": 2}
        assert node.join_options(
            {"overlap-check.template": "all"}, {"overlap-check": "none", "lazy-refcounts": "on"}
        ) == {"overlap-check.template": "all", "lazy-refcounts": "on"}
        assert node.join_options(
            {"refcount-cache-size": 1}, {"cache-size": 2, "l2-cache-size": 1}
        ) == {"refcount-cache-size": 1, "l2-cache-size": 1}
        assert node.join_options({"cache-size": 3}, {"l2-cache-size": 1}) == {"cache-size": 3}


def test_a_path_that_looks_like_a_protocol(folder: Path) -> None:
    qcow2x.create("image:b", 1 << 20)
    qcow2x.create("image:a", 1 << 20, backing_file="image:b", backing_format="qcow2")
    with open_node("file:image:a", io=False, backing=False) as node:
        assert (node.filename, node.full_backing_filename) == ("./image:a", "image:b")
    assert said("image:a").endswith("Unknown protocol 'image'")
    with open_node({"driver": "file", "filename": "image:a"}) as node:
        assert node.filename == "image:a"


def test_convert_to_luks(folder: Path) -> None:
    content = b"x" * 70000 + bytes(100_000) + b"y" * 400
    Path("r").write_bytes(content)
    how = qcow2x.Encryption(key=b"k", iter_time_ms=10)
    qcow2x.convert("r", "l", src_format="raw", dst_format="luks", encryption=how)
    spec = "driver=luks,key-secret=s,file.filename=l"
    with open_node(spec, image_opts=True, secrets={"s": b"k"}) as node:
        assert node.pread(node.size, 0).rstrip(b"\0") == content
        assert node.luks.cipher == "aes-256"  # type: ignore[attr-defined]
    with pytest.raises(ValueError):
        qcow2x.convert("r", "m", src_format="raw", dst_format="luks")
