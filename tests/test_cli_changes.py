"""amend, snapshot, bitmap, and what check and create say, as a user types them, next to qemu-img."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
from pathlib import Path

import pytest
from cli_helpers import MIB, qemu, qemu_img, qemu_io, run

SECRETS = [f"--object=secret,id=s{n},data=pass{n}" for n in range(3)]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def both(
    capfd: pytest.CaptureFixture[str], command: str, *args: object, image: str = "x.img"
) -> tuple[int, str, str]:
    """Runs a command on two copies of the image, with qemu-img and with ours: the same status,
    output and messages. Leaves ours in place."""
    capfd.readouterr()
    there = Path(image).exists()
    if there:
        shutil.copy(image, "kept.img")
    theirs = qemu("qemu-img", command, *args, ok=(0, 1, 2, 3))
    Path(image).unlink(missing_ok=True)
    if there:
        shutil.copy("kept.img", image)
    status = run(command, *args)
    out, err = capfd.readouterr()
    assert (status, out) == (theirs.returncode, theirs.stdout)
    ours = re.sub(r"(?m)^qcow2x: |'qcow2x ", lambda m: m[0].replace("qcow2x", "qemu-img"), err)
    assert ours.rstrip() == theirs.stderr.rstrip()
    return status, out, err


@pytest.mark.parametrize(
    "args",
    [
        ["-f", "qcow2", "-o", "cluster_size=1234", "x.img", "1M"],
        ["-f", "qcow2", "-o", "cluster_size=some", "x.img", "1M"],
        ["-f", "qcow2", "-o", "refcount_bits=3", "x.img", "1M"],
        ["-f", "qcow2", "-o", "refcount_bits=x", "x.img", "1M"],
        ["-f", "qcow2", "-o", "compat=0.10,refcount_bits=8", "x.img", "1M"],
        ["-f", "qcow2", "-o", "compat=0.10,lazy_refcounts=on", "x.img", "1M"],
        ["-f", "qcow2", "-o", "compat=0.10,extended_l2=on", "x.img", "1M"],
        ["-f", "qcow2", "-o", "compat=0.10,compression_type=zstd", "x.img", "1M"],
        ["-f", "qcow2", "-o", "compat=0.10,data_file=y", "x.img", "1M"],
        ["-f", "qcow2", "-o", "extended_l2=on,cluster_size=8k", "x.img", "1M"],
        ["-f", "qcow2", "-o", "data_file_raw=on", "x.img", "1M"],
        ["-f", "qcow2", "-o", "lazy_refcounts=maybe", "x.img", "1M"],
        ["-f", "qcow2", "-o", "unknown=1", "x.img", "1M"],
        ["-f", "qcow2", "-o", "size=1M", "x.img", "2M"],
        ["-f", "qcow2", "-o", ",size=1M", "x.img"],
        ["-f", "qcow2", "-o", "encrypt.cipher-alg=aes-128", "x.img", "1M"],
        ["-f", "qcow2", "-o", "encrypt.format=luks", "x.img", "1M"],
        ["-f", "qcow2", "-b", "", "x.img", "1M"],
        ["-f", "qcow2", "-b", "x.img", "-F", "raw", "x.img", "1M"],
        ["-f", "qcow2", "-b", "missing", "-F", "raw", "x.img", "1M"],
        ["-f", "qcow2", "-u", "-b", "missing", "x.img", "1M"],
        ["-f", "qcow2", "-F", "raw", "x.img", "1M"],
        ["-f", "qcow2", "-o", "preallocation=full", "-b", "base.img", "-F", "raw", "x.img"],
        ["-f", "qcow2", "-b", "base.img", "x.img"],
        ["-f", "qcow2", "x.img"],
        ["-f", "qcow2", "x.img", "1P", "-o", "cluster_size=512"],
        ["-f", "raw", "-b", "base.img", "-F", "raw", "x.img", "1M"],
        ["x.img", "1kilobyte"],
    ],
    ids=" ".join,
)
def test_create_says_what_is_wrong(args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-q", "-f", "raw", "base.img", "1M")
    status, _, _ = both(capfd, "create", *args)
    assert status == 1
    assert not Path("x.img").exists()


@pytest.mark.parametrize("format", ["qcow2", "raw", "luks"])
@pytest.mark.parametrize("name", [[], ["x.img"]])
def test_create_lists_its_options(
    format: str, name: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("create", "-f", format, "-o", "help", *name) == 0
    ours = capfd.readouterr().out
    theirs = qemu_img("create", "-f", format, "-o", "help", *name)
    # 10.0 has one more for LUKS.
    assert re.sub("  detached-header.*\n", "", ours) == theirs


def test_a_luks_header_in_another_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU 7.2 knows of none: header and data put behind each other are an image that it opens."""
    monkeypatch.chdir(tmp_path)
    Path("source").write_bytes(bytes(range(256)) * 4096)
    Path("data").write_bytes(bytes(MIB))
    options = "key-secret=s0,detached-header=on,iter-time=10"
    assert run("create", "-q", SECRETS[0], "-f", "luks", "-o", options, "header") == 0
    image = "driver=luks,key-secret=s{},file.filename=data,header.filename=header"
    image = image.replace("header.f", "header.driver=file,header.f")
    keyed = [SECRETS[0], SECRETS[1], "--target-image-opts", "-n"]
    assert run("convert", "-f", "raw", *keyed, "source", image.format(0)) == 0
    added = "state=active,new-secret=s1,iter-time=10"
    assert run("amend", *SECRETS[:2], "-o", added, "--image-opts", image.format(0)) == 0
    capfd.readouterr()
    assert run("info", "--output=json", "--image-opts", image.format(0)) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["virtual-size"] == MIB
    assert told["format-specific"]["data"]["detached-header"] is True
    for key in (0, 1):
        keyed = [SECRETS[key], "-O", "raw", "--image-opts", image.format(key), "out"]
        assert run("convert", *keyed) == 0
        assert Path("out").read_bytes() == Path("source").read_bytes()
    header = bytearray(Path("header").read_bytes())
    assert header[104:108] == bytes(4)
    header[104:108] = (len(header) // 512).to_bytes(4, "big")
    Path("whole").write_bytes(header + Path("data").read_bytes())
    whole = "driver=luks,key-secret=s1,file.filename=whole"
    qemu_img("convert", SECRETS[1], "-O", "raw", "--image-opts", whole, "out")
    assert Path("out").read_bytes() == Path("source").read_bytes()
    assert run("info", "-f", "luks", "header") == 1


def test_create_luks_opens_in_qemu(capfd: pytest.CaptureFixture[str]) -> None:
    args = [SECRETS[0], "-f", "luks", "-o", "key-secret=s0,iter-time=10", "x.img", "1M"]
    assert run("create", *args) == 0
    assert capfd.readouterr().out.endswith(" size=1048576 key-secret=s0 iter-time=10\n")
    options = "driver=luks,key-secret=s0,file.filename=x.img"
    info = json.loads(qemu_img("info", "--output=json", SECRETS[0], "--image-opts", options))
    assert info["virtual-size"] == MIB
    assert run("info", "-f", "luks", "x.img") == 0
    assert "encrypted: yes" in capfd.readouterr().out


def test_snapshots_come_and_go(capfd: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "x.img", "4M")
    qemu_io("x.img", "write -P 1 0 1M")
    assert run("snapshot", "-c", "first", "x.img") == 0
    qemu_io("x.img", "write -P 2 0 1M")
    qemu_img("snapshot", "-c", "1", "x.img")
    assert run("snapshot", "-l", "x.img") == 0
    listed = capfd.readouterr().out
    # The columns of 7.2 are narrower, and hours have two digits there.
    narrow = [line.split() for line in qemu_img("snapshot", "-l", "x.img").splitlines()]
    wide = [line.replace(" 0000:", " 00:").split() for line in listed.splitlines()]
    assert wide[2:] == narrow[2:]
    assert [line.split()[:2] for line in listed.splitlines()[2:]] == [["1", "first"], ["2", "1"]]
    both(capfd, "snapshot", "-a", "none", "x.img")
    both(capfd, "snapshot", "-d", "2", "x.img")
    both(capfd, "snapshot", "-a", "first", "x.img")
    qemu_io("x.img", "read -P 1 0 1M")
    # A name, even if it looks like an id.
    both(capfd, "snapshot", "-d", "1", "x.img")
    both(capfd, "snapshot", "-d", "first", "x.img")
    assert run("snapshot", "-l", "-c", "x", "x.img") == 1
    assert "Cannot mix" in capfd.readouterr().err
    qemu_img("check", "x.img")


def test_no_snapshots_where_there_cannot_be_any(capfd: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "data_file=x.data", "x.img", "1M")
    failed = "Could not create snapshot 's': Operation not supported\n"
    assert run("snapshot", "-c", "s", "x.img") == 1
    assert capfd.readouterr().err == f"qcow2x: {failed}"
    qemu_img("create", "-q", "-f", "raw", "x.img", "1M")
    both(capfd, "snapshot", "-l", "x.img")
    assert run("snapshot", "-c", "s", "x.img") == 1
    assert capfd.readouterr().err.endswith(failed)


def bitmaps(image: str) -> dict[str, tuple[int, list[str]]]:
    info = json.loads(qemu_img("info", "--output=json", image))
    found = info["format-specific"]["data"].get("bitmaps", [])
    return {b["name"]: (b["granularity"], b["flags"]) for b in found}


def test_bitmaps_come_and_go(capfd: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "x.img", "4M")
    qemu_img("create", "-q", "-f", "qcow2", "y.img", "4M")
    qemu_img("bitmap", "--add", "-g", "512k", "y.img", "there")
    qemu_io("y.img", "write 1M 1M")
    assert run("bitmap", "--add", "x.img", "a") == 0
    assert run("bitmap", "--add", "--disable", "-g", "4k", "x.img", "b") == 0
    assert bitmaps("x.img") == {"a": (65536, ["auto"]), "b": (4096, [])}
    assert run("bitmap", "--merge", "there", "-b", "y.img", "-F", "qcow2", "x.img", "b") == 0
    assert run("bitmap", "--enable", "x.img", "b") == 0
    assert run("bitmap", "--remove", "x.img", "a") == 0
    assert run("bitmap", "--add", "--merge", "b", "x.img", "c") == 0
    assert bitmaps("x.img") == {"b": (4096, ["auto"]), "c": (65536, ["auto"])}
    assert capfd.readouterr() == ("", "")
    import qcow2x

    with qcow2x.open("x.img") as image:
        assert image.bitmaps["c"].count == MIB
    assert run("bitmap", "--clear", "x.img", "c") == 0
    with qcow2x.open("x.img") as image:
        assert image.bitmaps["c"].count == 0
    qemu_img("check", "x.img")


@pytest.mark.parametrize(
    "args",
    [
        ["x.img", "a"],
        ["--add", "x.img"],
        ["--remove", "-g", "4k", "x.img", "a"],
        ["--add", "-b", "x.img", "x.img", "a"],
        ["--add", "-F", "raw", "x.img", "a"],
        ["--add", "x.img", "a"],
        ["--add", "x.img", ""],
        ["--add", "-g", "1000", "x.img", "new"],
        ["--remove", "x.img", "none"],
        ["--merge", "none", "x.img", "a"],
        ["--merge", "a", "-b", "y.img", "x.img", "a"],
    ],
    ids=" ".join,
)
def test_bitmap_says_what_is_wrong(args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    for name, size in (("x.img", "4M"), ("y.img", "8M")):
        qemu_img("create", "-q", "-f", "qcow2", name, size)
        qemu_img("bitmap", "--add", name, "a")
    status, _, _ = both(capfd, "bitmap", *args)
    assert status == 1


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10", "compat=0.42", "refcount_bits=64", "refcount_bits=5", "size=8M",
        "compat=0.10,lazy_refcounts=on", "compat=0.10,refcount_bits=8", "data_file=x",
        "data_file_raw=on", "backing_file=y", "preallocation=full", "unknown=1",
        "encrypt.state=active", "lazy_refcounts=on",
    ],
)  # fmt: skip
def test_amend(options: str, capfd: pytest.CaptureFixture[str]) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "x.img", "4M")
    qemu_io("x.img", "write -P 3 0 1M", "write -z 1M 1M")
    both(capfd, "amend", "-o", options, "x.img")
    qemu_img("check", "x.img")
    qemu_io("x.img", "read -P 3 0 1M", "read -P 0 1M 3M")


def test_amend_needs_options_and_knows_them(capfd: pytest.CaptureFixture[str]) -> None:
    for args in (["x.img"], ["-o", "compat=1.1"], ["-f", "raw", "-o", "help"]):
        both(capfd, "amend", *args)
    for format in ("qcow2", "luks"):
        assert run("amend", "-f", format, "-o", "help") == 0
        ours = capfd.readouterr().out.splitlines()
        theirs = qemu_img("amend", "-f", format, "-o", "help").splitlines()
        assert [line.split("=")[0] for line in ours[1:]] == [
            line.split("=")[0] for line in theirs[1:]
        ]


@pytest.mark.parametrize("format", ["qcow2", "luks"])
def test_amend_of_key_slots(format: str, capfd: pytest.CaptureFixture[str]) -> None:
    prefix = "encrypt." if format == "qcow2" else ""
    made = f"{prefix}key-secret=s0,{prefix}iter-time=10"
    made += ",encrypt.format=luks" if format == "qcow2" else ""
    qemu_img("create", "-q", *SECRETS, "-f", format, "-o", made, "x.img", "1M")

    def amend(key: int, *options: str, force: bool = False) -> int:
        given = ",".join(prefix + option for option in options)
        image = f"driver={format},file.filename=x.img,{prefix}key-secret=s{key}"
        more = ["--force"] if force else []
        return run("amend", *SECRETS, *more, "--image-opts", image, "-o", given)

    def opens(key: int) -> bool:
        image = f"driver={format},file.filename=x.img,{prefix}key-secret=s{key}"
        tried = qemu("qemu-io", SECRETS[key], "--image-opts", image, "-c", "read 0 512", ok=(0, 1))
        return tried.returncode == 0

    assert amend(0, "state=active", "new-secret=s1", "iter-time=10") == 0
    assert opens(0) and opens(1)
    assert amend(1, "state=active", "new-secret=s2", "keyslot=0", "iter-time=10") == 1
    assert "Refusing to overwrite active keyslot 0" in capfd.readouterr().err
    assert amend(1, "state=inactive", "old-secret=s0") == 0
    assert not opens(0) and opens(1)
    assert amend(1, "state=inactive", "old-secret=s0") == 1
    assert "No keyslots match" in capfd.readouterr().err
    assert amend(1, "state=inactive", "keyslot=1") == 1
    assert "the only active keyslot 1" in capfd.readouterr().err
    assert amend(1, "state=active", "new-secret=s2", "keyslot=1", "iter-time=10", force=True) == 0
    assert not opens(1) and opens(2)


def damaged(where: dict[int, int]) -> None:
    """An image of 4 MiB with 1 MiB of data and 64-bit words of the file changed."""
    qemu_img("create", "-q", "-f", "qcow2", "x.img", "4M")
    qemu_io("x.img", "write -P 3 0 1M")
    raw = bytearray(Path("x.img").read_bytes())
    for offset, value in where.items():
        struct.pack_into(">Q", raw, offset, value)
    Path("x.img").write_bytes(raw)


COPIED = 1 << 63
REFCOUNTS, L1, L2 = 0x20000, 0x30000, 0x40000


@pytest.mark.not_for_qemu("damaged on purpose")
@pytest.mark.parametrize(
    "where",
    [
        {},
        {REFCOUNTS + 8: 0x0001_0002_0001_0001},
        {REFCOUNTS + 8: 0x0001_0000_0001_0001},
        {L2: COPIED | 0x60000},
        {L2: 0},
        {L2: 0x50000},
        {L2: COPIED | 0x50200},
        {L2: COPIED | 1 << 57 | 0x50000},
        {L2: COPIED | 0x40_0000_0000},
        {L1: 0x40000},
        {L1: COPIED | 1 << 57 | 0x40000},
    ],
    ids=lambda where: ",".join(f"{k:x}={v:x}" for k, v in where.items()) or "sound",
)
def test_check_says_what_qemu_img_says(
    where: dict[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    damaged(where)
    both(capfd, "check", "x.img")
    both(capfd, "check", "--output=json", "x.img")
    both(capfd, "check", "-q", "x.img")


@pytest.mark.parametrize(
    "repair,where",
    [
        ("all", {}),
        ("leaks", {REFCOUNTS + 8: 0x0001_0002_0001_0001}),
        ("all", {REFCOUNTS + 8: 0x0001_0002_0001_0001}),
        ("all", {L2: COPIED | 0x60000}),
        ("all", {L2: 0}),
        ("leaks", {L2: 0}),
        ("all", {L2: 0x50000}),
        ("all", {L1: 0x40000}),
        ("all", {REFCOUNTS + 8: 0x0001_0000_0001_0001}),
    ],
    ids=str,
)
def test_repair_says_what_qemu_img_says(
    repair: str, where: dict[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    damaged(where)
    capfd.readouterr()
    shutil.copy("x.img", "theirs.img")
    theirs = qemu("qemu-img", "check", "-r", repair, "theirs.img", ok=(0, 1, 2, 3))
    assert run("check", "-r", repair, "--no-journal", "x.img") == theirs.returncode
    out, err = capfd.readouterr()
    assert (out, err) == (theirs.stdout, theirs.stderr)
    qemu_img("check", "x.img")
    qemu_img("compare", "x.img", "theirs.img")


def test_a_secret_that_another_one_encrypts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AES-256 in CBC mode, with the key 00 01 02 ... and the IV 00 01 02 ... of "letmein"."""
    monkeypatch.chdir(tmp_path)
    key = f"secret,id=k,format=base64,data={base64.b64encode(bytes(range(32))).decode()}"
    iv = base64.b64encode(bytes(range(16))).decode()
    encrypted = bytes.fromhex("488e09b96aa6245f1b8c3f4827aeb67a")
    Path("raw").write_bytes(encrypted)
    Path("text").write_bytes(base64.b64encode(encrypted))
    Path("plain").write_bytes(b"letmein")
    image = "driver=luks,key-secret=s,file.filename=x.img"
    made = ["-f", "luks", "-o", "key-secret=s,iter-time=10", "x.img", "1M"]
    assert run("create", "-q", "--object=secret,id=s,file=plain", *made) == 0
    for source in ("file=raw", "file=text,format=base64"):
        secret = f"secret,id=s,keyid=k,iv={iv},{source}"
        args = ["--object", key, "--object", secret, "--image-opts", image]
        qemu("qemu-io", *args, "-c", "read 0 4k")
        assert run("map", *args) == 0
    capfd.readouterr()
    for objects, message in (
        (["secret,id=k,data=short", f"secret,id=s,keyid=k,iv={iv},file=raw"], "Key should be 32"),
        ([key, "secret,id=s,keyid=k,file=raw"], "IV is required to decrypt secret"),
        ([key, "secret,id=s,keyid=k,iv=AAAA,file=raw"], "IV should be 16 bytes in length not 3"),
        ([key, f"secret,id=s,keyid=k,iv={iv},file=plain"], "Length 7 must be a multiple of block"),
        ([f"secret,id=s,keyid=k,iv={iv},file=raw"], "No secret with id 'k'"),
        ([key, "secret,id=s,keyid=k,iv=A!AA,file=raw"], "contains invalid characters"),
    ):
        args = [word for one in objects for word in ("--object", one)]
        assert run("map", *args, "--image-opts", image) == 1
        ours = capfd.readouterr().err
        assert message in ours
        theirs = qemu("qemu-img", "map", *args, "--image-opts", image, ok=(1,)).stderr
        assert ours.partition(": ")[2] == theirs.partition(": ")[2]
