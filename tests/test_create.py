"""Creating images: QEMU opens them, finds them clean, and lays them out the same way."""

import errno
import json
import os
import subprocess
import sys

import pytest

import qcow2x
from qcow2x._core.header import Header
from qcow2x._core.storage import FileStorage
from qcow2x.errors import FormatError, ImageLocked, NoSpace
from qcow2x.ops.create import create

MiB = 1 << 20


def qemu_img(*args, code=0):
    run = subprocess.run(["qemu-img", *map(str, args)], check=False, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    return run.stdout


def info(path):
    return json.loads(qemu_img("info", "-U", "--output=json", path))


def assert_clean(path):
    found = json.loads(qemu_img("check", "--output=json", path))
    assert not found.get("leaks") and not found.get("corruptions") and not found["check-errors"]


def shape_id(value):
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def shapes():
    """Every cluster size with every refcount width, the other options turned over as it goes."""
    sizes = [0, 512, 1000, 100 * MiB, (1 << 30) + 1]
    turn = 0
    for cluster_bits in range(9, 22):
        for refcount_order in range(7):
            turn += 1
            options = {
                "cluster_size": 1 << cluster_bits,
                "refcount_bits": 1 << refcount_order,
                "lazy_refcounts": turn % 2 == 0,
                "extended_l2": cluster_bits >= 14 and turn % 3 == 0,
                "compression_type": "zstd" if turn % 5 == 0 else "zlib",
            }
            if refcount_order == 4 and turn % 4 == 0:
                options = {"cluster_size": 1 << cluster_bits, "compat": "0.10"}
            yield sizes[turn % len(sizes)], options


@pytest.mark.parametrize("size, options", list(shapes()), ids=shape_id)
def test_new_image_is_clean_and_says_what_was_asked(tmp_path, size, options):
    path = tmp_path / "disk.qcow2"
    create(path, size, **options)
    assert_clean(path)
    told = info(path)
    assert told["virtual-size"] == -(-size // 512) * 512
    assert told["cluster-size"] == options["cluster_size"]
    data = told["format-specific"]["data"]
    assert data["compat"] == options.get("compat", "1.1")
    assert data["refcount-bits"] == options.get("refcount_bits", 16)
    assert data.get("lazy-refcounts", False) == options.get("lazy_refcounts", False)
    assert data.get("extended-l2", False) == options.get("extended_l2", False)
    assert data["compression-type"] == options.get("compression_type", "zlib")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"cluster_size": 512, "refcount_bits": 8},
        {"cluster_size": 2 * MiB, "extended_l2": "on", "lazy_refcounts": "on"},
        {"cluster_size": 4096, "refcount_bits": 1, "compression_type": "zstd"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [0, 1 * MiB, 8 << 30])
def test_new_image_is_byte_for_byte_that_of_qemu(tmp_path, size, options):
    if options.get("cluster_size") == 512:
        size = min(size, 10 * MiB)
    listed = ",".join(f"{name}={value}" for name, value in options.items())
    qemu_img(
        "create", "-q", "-f", "qcow2", *(["-o", listed] if listed else []), tmp_path / "q", size
    )
    ours = {name: value == "on" if value == "on" else value for name, value in options.items()}
    create(tmp_path / "x", size, **ours)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "q").read_bytes()


@pytest.mark.parametrize(
    "options, largest",
    [
        ({"cluster_size": 512, "refcount_bits": 64}, 128 << 30),
        ({"cluster_size": 65536}, 2 << 50),
        ({"cluster_size": 65536, "extended_l2": True}, 1 << 50),
        ({"cluster_size": 2 * MiB}, 2 << 60),
    ],
    ids=str,
)
def test_largest_disk_of_a_cluster_size_is_clean_and_one_more_is_refused(
    tmp_path, options, largest
):
    path = tmp_path / "disk.qcow2"
    create(path, largest, **options)
    assert_clean(path)
    assert info(path)["virtual-size"] == largest
    with pytest.raises(ValueError, match="choose a larger cluster_size"):
        create(tmp_path / "more.qcow2", largest + 1, **options)
    assert not (tmp_path / "more.qcow2").exists()


def test_qemu_writes_into_a_new_image(tmp_path):
    path = tmp_path / "disk.qcow2"
    for options in ({}, {"cluster_size": 512, "refcount_bits": 1}, {"extended_l2": True}):
        create(path, 8 * MiB, **options)
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 4M", "-c", "read -P 7 0 4M"]
            + ["-c", "read -P 0 4M 4M", str(path)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        assert_clean(path)


def test_backing_file_is_recorded_and_gives_the_size(tmp_path):
    create(tmp_path / "base.qcow2", 5 * MiB)
    (tmp_path / "base.raw").write_bytes(bytes(1000))
    create(tmp_path / "top.qcow2", backing_file="base.qcow2", backing_format="qcow2")
    told = info(tmp_path / "top.qcow2")
    assert told["virtual-size"] == 5 * MiB
    assert (told["backing-filename"], told["backing-filename-format"]) == ("base.qcow2", "qcow2")
    create(tmp_path / "top.qcow2", backing_file=tmp_path / "base.raw", backing_format="raw")
    told = info(tmp_path / "top.qcow2")
    assert told["virtual-size"] == 1024
    assert told["full-backing-filename"] == str(tmp_path / "base.raw")
    assert_clean(tmp_path / "top.qcow2")


def test_backing_file_is_not_touched_where_size_is_given(tmp_path):
    path = tmp_path / "top.qcow2"
    create(path, MiB, backing_file="nbd://host/name", backing_format="raw")
    assert info(path)["backing-filename"] == "nbd://host/name"


def test_size_of_a_backing_file_that_is_no_qcow2_image(tmp_path):
    (tmp_path / "base").write_bytes(bytes(65536))
    with pytest.raises(FormatError, match="base: Image is not in qcow2 format"):
        create(tmp_path / "top.qcow2", backing_file="base", backing_format="qcow2")
    with pytest.raises(FileNotFoundError):
        create(tmp_path / "top.qcow2", backing_file="missing", backing_format="raw")
    assert os.listdir(tmp_path) == ["base"]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"size": -1}, "size must not be negative"),
        ({"size": None}, "size is required"),
        ({"cluster_size": 0}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"cluster_size": 256}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"cluster_size": 3000}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"cluster_size": 4 * MiB}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"refcount_bits": 0}, "Refcount width must be a power of two"),
        ({"refcount_bits": 3}, "Refcount width must be a power of two"),
        ({"refcount_bits": 128}, "Refcount width must be a power of two"),
        ({"compat": "1.2"}, "Parameter 'version' does not accept value"),
        ({"compat": "0.10", "refcount_bits": 8}, "Different refcount widths than 16 bits"),
        ({"compat": "0.10", "lazy_refcounts": True}, "Lazy refcounts only supported"),
        ({"compat": "0.10", "extended_l2": True}, "Extended L2 entries are only supported"),
        (
            {"compat": "0.10", "compression_type": "zstd"},
            "Non-zlib compression type is only supported",
        ),
        ({"extended_l2": True, "cluster_size": 8192}, "at least 16384"),
        ({"compression_type": "lzma"}, "'compression-type' does not accept"),
        ({"preallocation": "some"}, "'preallocation' does not accept"),
        ({"backing_format": "raw"}, "without backing file"),
        ({"backing_file": "base"}, "backing_format is required"),
        ({"backing_file": "base", "backing_format": "rar"}, "'backing-fmt' does not accept"),
        ({"backing_file": "", "backing_format": "raw"}, "backing_file must be a name"),
        ({"backing_file": "x" * 1024, "backing_format": "raw"}, "at most 1023"),
        (
            {"backing_file": "x" * 400, "backing_format": "raw", "cluster_size": 512},
            "a cluster has",
        ),
        ({"size": None, "backing_file": "b", "backing_format": "vmdk"}, "size is required"),
        ({"size": None, "backing_file": "nbd:x", "backing_format": "raw"}, "size is required"),
        (
            {"backing_file": "b", "backing_format": "raw", "preallocation": "metadata"},
            "only be used at the same time if extended_l2 is on",
        ),
        ({"data_file_raw": True}, "data-file-raw requires data-file"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_argument_is_refused_and_an_existing_file_kept(tmp_path, options, sentence):
    path = tmp_path / "precious"
    path.write_bytes(b"precious")
    with pytest.raises(ValueError, match=sentence):
        create(path, **({"size": MiB} | options))
    assert path.read_bytes() == b"precious"


def test_what_cannot_be_created_yet_is_named(tmp_path):
    with pytest.raises(TypeError, match="qcow2x.Encryption"):
        create(tmp_path / "x", MiB, encryption="luks")


def test_image_cannot_be_its_own_backing_file(tmp_path):
    create(tmp_path / "x.qcow2", MiB)
    os.symlink("x.qcow2", tmp_path / "y.qcow2")
    with pytest.raises(ValueError, match="its own backing file"):
        create(tmp_path / "y.qcow2", backing_file="x.qcow2", backing_format="qcow2")
    assert info(tmp_path / "x.qcow2")["virtual-size"] == MiB


def test_existing_file_is_replaced_whole(tmp_path):
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"\xff" * (4 * MiB))
    create(path, MiB)
    assert path.stat().st_size < MiB
    assert_clean(path)


def test_preallocated_metadata_takes_no_room_for_data(tmp_path):
    path = tmp_path / "disk.qcow2"
    create(path, 3 << 30, preallocation="metadata", cluster_size=MiB)
    with qcow2x.open(path) as image, open(path, "rb") as file:
        for extent in image.extents():
            try:
                data = os.lseek(file.fileno(), extent.host_offset, os.SEEK_DATA)
            except OSError:
                continue  # No data up to the end of the file.
            assert data >= extent.host_offset + extent.length
    assert_clean(path)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", [{}, {"cluster_size": 512}, {"extended_l2": True}], ids=str)
def test_preallocated_image_has_a_place_for_every_cluster(tmp_path, mode, options):
    path = tmp_path / "disk.qcow2"
    create(path, 3 * MiB + 512, preallocation=mode, **options)
    found = json.loads(qemu_img("check", "--output=json", path))
    assert found["allocated-clusters"] == found["total-clusters"]
    assert_clean(path)
    if mode != "metadata":
        assert path.stat().st_blocks * 512 >= 3 * MiB
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-r", "-c", "read -P 0 0 3146240", str(path)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def test_preallocation_keeps_what_shows_through_from_the_backing_file(tmp_path):
    (tmp_path / "base.raw").write_bytes(b"b" * MiB)
    path = tmp_path / "top.qcow2"
    create(
        path,
        backing_file="base.raw",
        backing_format="raw",
        extended_l2=True,
        preallocation="metadata",
    )
    assert info(path)["backing-filename"] == "base.raw"
    assert json.loads(qemu_img("check", "--output=json", path))["allocated-clusters"] == 16
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, tmp_path / "base.raw")


def test_image_that_is_open_elsewhere_is_not_replaced(tmp_path):
    path = tmp_path / "disk.qcow2"
    create(path, MiB)
    before = path.read_bytes()
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        holder.stdin.write("read 0 512\n")
        holder.stdin.flush()
        holder.stdout.readline()
        with pytest.raises(ImageLocked):
            create(path, 2 * MiB)
        holder.communicate("quit\n", timeout=60)
    assert path.read_bytes() == before


class FailingDisk:
    """A Python storage whose k-th change fails."""

    def __init__(self, fail_at=None):
        self.bytes, self.changes, self.fail_at = bytearray(), 0, fail_at

    def change(self):
        self.changes += 1
        if self.changes - 1 == self.fail_at:
            raise OSError(errno.ENOSPC, "no room")

    def size(self):
        return len(self.bytes)

    def pread(self, length, offset):
        return bytes(self.bytes[offset : offset + length])

    def pwrite(self, data, offset):
        self.change()
        data = bytes(data)
        if len(self.bytes) < offset + len(data):
            self.bytes.extend(bytes(offset + len(data) - len(self.bytes)))
        self.bytes[offset : offset + len(data)] = data
        return len(data)

    def flush(self):
        self.change()

    def truncate(self, size):
        self.change()
        del self.bytes[size:]
        self.bytes.extend(bytes(size - len(self.bytes)))


def test_python_object_holds_an_image_and_every_failure_is_told(tmp_path):
    disk = FailingDisk()
    create(disk, MiB)
    (tmp_path / "copy.qcow2").write_bytes(disk.bytes)
    assert_clean(tmp_path / "copy.qcow2")
    for k in range(disk.changes):
        with pytest.raises(OSError) as caught:
            create(FailingDisk(fail_at=k), MiB)
        assert caught.value.errno == errno.ENOSPC


def test_file_descriptor_and_storage_stay_open_with_the_caller(tmp_path):
    path = tmp_path / "disk.qcow2"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        create(fd, MiB)
        assert os.fstat(fd).st_size == path.stat().st_size
        assert_clean(path)
    finally:
        os.close(fd)
    with FileStorage(path, writable=True) as storage:
        create(storage, 2 * MiB)
        assert Header.load(storage.pread, storage.size()).size == 2 * MiB
    assert_clean(path)


def test_new_file_that_cannot_be_finished_is_removed(tmp_path):
    script = (
        "import resource, signal, sys\n"
        "from qcow2x.ops.create import create\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
        "create(sys.argv[1], 1 << 20)\n"
    )
    path = tmp_path / "disk.qcow2"
    run = subprocess.run(
        [sys.executable, "-c", script, str(path)], check=False, capture_output=True, text=True
    )
    assert run.returncode == 1 and NoSpace.__name__ in run.stderr, run.stderr
    assert not path.exists()


def test_folder_and_missing_folder_are_refused(tmp_path):
    with pytest.raises(IsADirectoryError):
        create(tmp_path, MiB)
    with pytest.raises(FileNotFoundError):
        create(tmp_path / "no" / "disk.qcow2", MiB)
