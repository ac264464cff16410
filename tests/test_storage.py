"""Where bytes live: every cache mode against a bytearray, and what is refused at the door."""

import errno
import fcntl
import mmap
import os
import random
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.device import block_device

from qcow2x.errors import NoSpace, StorageError
from qcow2x.storage import CACHE_MODES, FileStorage, PyStorage, Storage, open_storage

DIRECT = ("none", "directsync")
DURABLE = ("writethrough", "directsync")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.touch()
    return file


def aligned(size: int, shift: int = 0) -> memoryview:
    """Page-aligned memory (mmap gives no other), moved by ``shift`` bytes."""
    return memoryview(mmap.mmap(-1, size + 4096))[shift : shift + size]


# ---- Every mode against a model ------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_random_reads_and_writes_match_a_bytearray(path: Path, cache: str) -> None:
    rng = random.Random(cache)
    model = bytearray()
    with FileStorage(path, True, cache) as storage:
        for step in range(250):
            offset = rng.randrange(400_000)
            length = rng.choice([0, 1, 17, 511, 512, 513, 4096, 5000, 65536])
            if step % 60 == 0:
                length = 2_500_000 + step
            if step % 3 == 0:
                offset &= ~4095
            data = aligned(length, rng.choice([0, 0, 1, 512]))
            data[:] = rng.randbytes(length)
            assert storage.pwrite(data, offset) == length
            if length and len(model) < offset + length:
                model.extend(bytes(offset + length - len(model)))
            model[offset : offset + length] = data
        slack = storage.size() - len(model)
        assert slack == 0 if cache not in DIRECT else 0 <= slack < storage.alignment
        for _ in range(250):
            offset = rng.randrange(len(model))
            want = aligned(rng.choice([1, 512, 700, 4096, 200_000]), rng.choice([0, 3, 512]))
            got = storage.preadinto(want, offset)
            expected = model[offset : offset + len(want)]
            assert got >= len(expected)
            assert want[: len(expected)] == expected
            assert want[len(expected) : got] == bytes(got - len(expected))
        storage.flush()
    assert path.read_bytes() == model + bytes(slack)


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_threads_writing_into_the_same_blocks_lose_nothing(path: Path, cache: str) -> None:
    """Unaligned writes beside aligned ones: a stale edge must not undo a neighbour's write."""
    block, blocks, rounds = 4096, 16, 25
    with FileStorage(path, True, cache) as storage:
        storage.truncate(block * blocks)
        failures: list[Exception] = []

        def work(part: int) -> None:
            # Thread `part` owns one slice of each block; two of the slices are whole sectors.
            first, last = [(0, 512), (512, 700), (700, 1024), (1024, 4096)][part]
            try:
                for turn in range(rounds):
                    for at in range(blocks):
                        fill = bytes([part * 60 + turn]) * (last - first)
                        storage.pwrite(fill, at * block + first)
                        back = storage.pread(last - first, at * block + first)
                        assert back == fill, f"thread {part}, block {at}, turn {turn}"
            except (AssertionError, OSError) as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_which_writes_are_durable_at_return(path: Path, cache: str) -> None:
    with FileStorage(path, True, cache) as storage:
        storage.pwrite(b"x" * 5000, 100)
        storage.pwrite(b"x" * 3_000_000, 7)
        assert (storage.unsynced_writes == 0) == (cache in DURABLE)
        storage.flush()
        assert storage.unsynced_writes == 0
        storage.pwrite(b"", 0)
        assert storage.unsynced_writes == 0


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_gathered_writes(path: Path, cache: str) -> None:
    rng = random.Random(9)
    model = bytearray(8 << 20)
    with FileStorage(path, True, cache) as storage, python_memory(len(model)) as other:
        storage.truncate(len(model))
        for lengths in (
            [],
            [0, 0],
            [0, 5, 0, 7, 0],
            [4096] * 3,
            [512, 1024, 0, 4096],
            [1] * 200,
            [4096] * 300,
            [100, 1 << 20, 3, 2 << 20, 1],
        ):
            for offset in (0, 4096, 777):
                parts = [aligned(n, rng.choice([0, 0, 3])) for n in lengths]
                for part in parts:
                    part[:] = rng.randbytes(len(part))
                whole = b"".join(parts)
                for target in (storage, other):
                    assert target.pwritev(parts, offset) == len(whole)
                    model[offset : offset + len(whole)] = whole
                    assert target.pread(len(model), 0) == model, (lengths, offset)
        storage.flush()
        storage.pwritev([b"abc", b"def"], 5, fua=True)
        assert (storage.unsynced_writes == 0) or cache == "unsafe"
        with pytest.raises(TypeError):
            storage.pwritev([b"a", "b"], 0)  # type: ignore[list-item]


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_reads_stop_at_the_end(path: Path, cache: str) -> None:
    path.write_bytes(b"abc" * 1000)
    with FileStorage(path, cache=cache) as storage:
        assert storage.size() == 3000
        assert storage.pread(10, 2998) == b"bc"
        assert storage.pread(10, 3000) == b""
        assert storage.pread(10, 1 << 40) == b""
        buffer = bytearray(b"." * 8)
        assert storage.preadinto(buffer, 2997) == 3
        assert buffer == b"abc....."


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_truncate_zero_punch_and_reserve(path: Path, cache: str) -> None:
    mib = 1 << 20
    with FileStorage(path, True, cache) as storage:
        storage.pwrite(b"\xaa" * (4 * mib), 0)
        storage.flush()
        model = bytearray(b"\xaa" * (4 * mib))
        for offset, length, unmap in [
            (mib, mib, True),
            (10, 5000, True),
            (3 * mib, 65536, False),
            (3 * mib + 70001, 3, False),
            (4 * mib - 100, 5000, True),
            (5 * mib + 1, 9000, False),
            (6 * mib, mib, True),
        ]:
            storage.zero(offset, length, may_unmap=unmap)
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = bytes(length)
            assert storage.pread(len(model), 0) == model, (offset, length, unmap)
            assert len(model) <= storage.size() < len(model) + 4096
        assert storage.extent(mib, mib) == (mib, "zero")
        assert storage.extent(2 * mib, mib)[1] == "data"
        storage.punch(2 * mib, mib)
        assert storage.pread(mib, 2 * mib) in (bytes(mib), b"\xaa" * mib)
        size = storage.size()
        storage.punch(size - 4096, mib)
        assert storage.size() == size
        storage.reserve(8 * mib, mib)
        assert storage.size() == 9 * mib
        assert storage.pread(mib, 8 * mib) == bytes(mib)
        storage.truncate(100)
        assert storage.size() == 100
        storage.truncate(1000)
        assert storage.pread(2000, 100) == bytes(900)


def test_extents_of_a_sparse_file(path: Path) -> None:
    mib = 1 << 20
    with path.open("wb") as file:
        file.truncate(8 * mib)
        file.seek(2 * mib)
        file.write(b"d" * mib)
    with FileStorage(path) as storage:
        assert storage.extent(0, 100 * mib) == (2 * mib, "zero")
        assert storage.extent(mib, 100) == (100, "zero")
        assert storage.extent(2 * mib + 5, 100 * mib) == (mib - 5, "data")
        assert storage.extent(3 * mib, 100 * mib) == (5 * mib, "zero")
        assert storage.extent(8 * mib, 100) == (100, "end")


def test_a_full_file_system_is_told_as_such(path: Path) -> None:
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with FileStorage(path, True) as storage:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
            storage.pwrite(b"x" * 9000, 0)
            with pytest.raises(NoSpace, match=str(path)) as caught:
                storage.pwrite(b"x" * 9000, 9000)
            assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


# ---- Block devices -------------------------------------------------------------------------------


@pytest.fixture(params=[512, 4096])
def device(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, int]]:
    with block_device(tmp_path / "disk", 8 << 20, request.param) as path:
        yield path, request.param


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_block_device(device: tuple[Path, int], cache: str) -> None:
    path, sector = device
    is_device = stat.S_ISBLK(path.stat().st_mode)
    size = 8 << 20
    rng = random.Random(3)
    model = bytearray(size)
    with FileStorage(path, True, cache) as storage:
        assert storage.size() == size
        if is_device:
            assert storage.alignment == (sector if cache in DIRECT else 1)
        for _ in range(60):
            offset = rng.randrange(size - 70000)
            data = rng.randbytes(rng.choice([1, 512, 5000, 65536]))
            storage.pwrite(data, offset)
            model[offset : offset + len(data)] = data
        for offset, length in ((100, 5000), (1 << 20, 1 << 20), (size - 700, 700)):
            storage.zero(offset, length, may_unmap=True)
            model[offset : offset + length] = bytes(length)
        storage.punch(3 << 20, 0)
        storage.flush()
        assert storage.pread(size, 0) == model
        assert storage.extent(size - 10, 100)[0] == 10
        assert storage.extent(size, 100) == (100, "end")
        if is_device:
            storage.truncate(size // 2)
            storage.reserve(0, size)
            assert storage.size() == size
            for beyond in (
                lambda: storage.truncate(size + 1),
                lambda: storage.reserve(size - 10, 11),
                lambda: storage.pwrite(b"x" * 4096, size),
            ):
                with pytest.raises(NoSpace):
                    beyond()


# ---- At the door ---------------------------------------------------------------------------------


def test_read_only_takes_no_writes(path: Path) -> None:
    path.write_bytes(b"abc")
    with FileStorage(path) as storage:
        assert not storage.writable
        for write in (
            lambda: storage.pwrite(b"x", 0),
            lambda: storage.truncate(0),
            lambda: storage.zero(0, 1),
            lambda: storage.punch(0, 1),
            lambda: storage.reserve(0, 1),
        ):
            with pytest.raises(PermissionError):
                write()
    assert path.read_bytes() == b"abc"


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_a_descriptor_is_duplicated_and_its_cursor_stays(path: Path, cache: str) -> None:
    path.write_bytes(bytes(1 << 20))
    fd = os.open(path, os.O_RDWR)
    try:
        os.lseek(fd, 77, os.SEEK_SET)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        with FileStorage(fd, True, cache) as storage:
            assert storage.fileno() != fd
            assert not os.get_inheritable(storage.fileno())
            storage.pwrite(b"through", 3)
            assert storage.extent(0, 4096)[0] == 4096
            assert os.lseek(fd, 0, os.SEEK_CUR) == 77
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == flags
        assert os.pread(fd, 7, 3) == b"through"
    finally:
        os.close(fd)


def test_a_descriptor_opened_direct_is_aligned_in_any_mode(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    with FileStorage(fd, True) as storage:
        os.close(fd)
        assert storage.alignment > 1
        storage.pwrite(b"odd", 5)
        assert storage.pread(5, 4) == b"\0odd\0"


def test_descriptors_that_cannot_serve(path: Path) -> None:
    for flags, writable, reason in [
        (os.O_RDONLY, True, "read-only"),
        (os.O_WRONLY, False, "write-only"),
        (os.O_RDWR | os.O_APPEND, True, "appending"),
        (os.O_PATH, False, "O_PATH"),
    ]:
        fd = os.open(path, flags)
        try:
            with pytest.raises(OSError, match=reason):
                FileStorage(fd, writable)
        finally:
            os.close(fd)
    with pytest.raises(OSError) as caught:
        FileStorage(987654)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_what_is_no_file_is_refused(tmp_path: Path, writable: bool, cache: str) -> None:
    with pytest.raises(IsADirectoryError):
        open_storage(tmp_path, writable=writable, cache=cache)
    with pytest.raises(FileNotFoundError) as caught:
        open_storage(tmp_path / "missing", writable=writable, cache=cache)
    assert "missing" in str(caught.value)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for odd, word in ((fifo, "FIFO"), (Path("/dev/zero"), "character device")):
        # In an O_DIRECT mode the kernel may refuse before we can look; either names the file.
        match = word if cache == "writeback" else str(odd)
        with pytest.raises(StorageError, match=match):
            open_storage(odd, writable=writable, cache=cache)
    with socket.socket() as sock, pytest.raises(StorageError, match="socket"):
        open_storage(sock.fileno(), writable=writable)


def test_a_file_system_without_o_direct_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an old tmpfs, where open answers EINVAL."""
    real = os.open

    def refuse(name: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", name)
        return real(name, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    for cache in DIRECT:
        with pytest.raises(StorageError, match=f"{path}.*'{cache}'.*O_DIRECT"):
            FileStorage(path, True, cache)


def test_sources_that_are_none(path: Path) -> None:
    for source, error in [
        (True, TypeError),
        (-1, ValueError),
        ("", ValueError),
        ("a\0b", ValueError),
        (b"a\0b", ValueError),
        (None, TypeError),
        (object(), TypeError),
        (1.5, TypeError),
    ]:
        with pytest.raises(error):
            open_storage(source)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="writeback"):
        open_storage(path, cache="write-back")
    with FileStorage(path) as storage:
        assert open_storage(storage) is storage
        with pytest.raises(PermissionError):
            open_storage(storage, writable=True)
    for good in (path, str(path), os.fsencode(path)):
        with open_storage(good, writable=True) as storage:
            assert storage.name == str(path)
            assert storage.writable


def test_create_and_exclusive(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with FileStorage(path, True, create=True) as storage:
        storage.pwrite(b"kept", 0)
    with FileStorage(path, True, create=True) as storage:
        assert storage.pread(9, 0) == b"kept"
    with pytest.raises(FileExistsError):
        FileStorage(path, True, exclusive=True)
    with FileStorage(tmp_path / "other", True, exclusive=True) as storage:
        assert storage.size() == 0


def test_numbers_out_of_range(path: Path) -> None:
    with FileStorage(path, True) as storage:
        for bad in (-1, 1 << 63, 1 << 70):
            for call, arguments in (
                (storage.pread, (bad, 0)),
                (storage.pread, (1, bad)),
                (storage.pwrite, (b"x", bad)),
                (storage.preadinto, (bytearray(1), bad)),
                (storage.truncate, (bad,)),
                (storage.zero, (bad, 1)),
                (storage.punch, (1, bad)),
            ):
                with pytest.raises(ValueError, match="out of range"):
                    call(*arguments)
        with pytest.raises((TypeError, AttributeError)):
            storage.pread("1", 0)  # type: ignore[arg-type]
        with pytest.raises(BufferError):
            storage.preadinto(b"constant", 0)
        with pytest.raises(OSError):
            storage.pwrite(b"xx", (1 << 63) - 2)


def test_after_close(path: Path) -> None:
    storage = FileStorage(path, True)
    number = storage.fileno()
    storage.close()
    storage.close()
    # The number is not given to a file opened since, which a late write could then destroy.
    other = os.open(path, os.O_RDONLY)
    assert other != number
    os.close(other)
    for call in (
        storage.size,
        storage.flush,
        storage.fileno,
        lambda: storage.pwrite(b"x", 0),
        lambda: storage.truncate(0),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_storage_releases_its_descriptor(path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for cache in CACHE_MODES:
        for _ in range(20):
            FileStorage(path, True, cache).pwrite(b"x", 5)
            with FileStorage(path, True, cache) as storage:
                storage.pread(5, 1)
            del storage
            with pytest.raises(IsADirectoryError):
                FileStorage(path.parent, cache=cache)
    assert count() == before


# ---- Python objects ------------------------------------------------------------------------------


class Memory:
    """A bytearray as storage that may answer in small portions, and writes down its calls."""

    def __init__(self, content: bytes = b"", portion: int = 1 << 30) -> None:
        self.content = bytearray(content)
        self.portion = portion
        self.calls: list[tuple[object, ...]] = []

    def size(self) -> int:
        return len(self.content)

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.content[offset : offset + min(length, self.portion)])

    def pwrite(self, buffer: bytes, offset: int) -> int:
        part = buffer[: self.portion]
        self.calls.append(("pwrite", offset, part))
        if offset > len(self.content):
            self.content.extend(bytes(offset - len(self.content)))
        self.content[offset : offset + len(part)] = part
        return len(part)

    def flush(self) -> None:
        self.calls.append(("flush",))

    def truncate(self, size: int) -> None:
        self.calls.append(("truncate", size))
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))


def python_memory(size: int) -> PyStorage:
    return PyStorage(Memory(bytes(size), 1_000_000), True)


class MemoryInto(Memory):
    def preadinto(self, buffer: memoryview, offset: int) -> int:
        part = self.pread(len(buffer), offset)
        buffer[: len(part)] = part
        return len(part)

    def punch(self, offset: int, length: int) -> None:
        self.calls.append(("punch", offset, length))


@pytest.mark.parametrize("cls", [Memory, MemoryInto])
@pytest.mark.parametrize("portion", [1 << 30, 7])
def test_python_object(cls: type[Memory], portion: int) -> None:
    memory = cls(b"0123456789" * 10, portion)
    storage = open_storage(memory, writable=True)
    assert isinstance(storage, PyStorage)
    assert storage.size() == 100
    assert storage.pread(20, 5) == memory.content[5:25]
    assert storage.pread(20, 95) == b"56789"
    buffer = bytearray(30)
    assert storage.preadinto(buffer, 1) == 30
    assert buffer == memory.content[1:31]
    assert storage.pwrite(b"a longer text", 50) == 13
    assert memory.content[50:63] == b"a longer text"
    storage.zero(10, 10)
    assert memory.content[10:20] == bytes(10)
    storage.truncate(40)
    assert storage.size() == 40
    storage.punch(0, 5)
    assert (("punch", 0, 5) in memory.calls) == (cls is MemoryInto)
    assert storage.extent(10, 100) == (30, "data")
    assert storage.extent(40, 100) == (100, "end")
    with pytest.raises(ValueError, match="reserve"):
        storage.reserve(0, 10)


def test_python_object_sees_the_order_of_calls_and_the_cache_mode() -> None:
    for cache, expected in [
        ("writeback", ["pwrite", "pwrite", "flush"]),
        ("writethrough", ["pwrite", "flush", "pwrite", "flush", "flush"]),
        ("unsafe", ["pwrite", "pwrite"]),
    ]:
        memory = Memory()
        storage = open_storage(memory, writable=True, cache=cache)
        storage.pwrite(b"one", 0)
        storage.pwrite(b"two", 3)
        storage.flush()
        assert [call[0] for call in memory.calls] == expected
        assert storage.unsynced_writes == 0


def test_python_object_keeps_what_it_was_given() -> None:
    memory = Memory()
    kept = []
    memory.pwrite = lambda buffer, offset: kept.append(buffer) or len(buffer)  # type: ignore
    storage = PyStorage(memory, True)
    for i in range(50):
        storage.pwrite(bytes([i]) * 1000, 0)
    assert kept == [bytes([i]) * 1000 for i in range(50)]


class Strange(Exception):
    pass


@pytest.mark.parametrize("method", ["size", "pread", "pwrite", "flush", "truncate", "punch"])
@pytest.mark.parametrize("error", [Strange, KeyboardInterrupt, OSError])
def test_exceptions_of_the_object_come_through(method: str, error: type[BaseException]) -> None:
    memory = MemoryInto(bytes(100))
    raised = error("from the object")

    def fail(*args: object) -> None:
        raise raised

    setattr(memory, method, fail)
    if method == "pread":
        memory.preadinto = fail  # type: ignore[assignment,method-assign]
    storage = PyStorage(memory, True)
    arguments = {
        "size": (),
        "pread": (1, 0),
        "pwrite": (b"x", 0),
        "flush": (),
        "truncate": (5,),
        "punch": (0, 5),
    }[method]
    for _ in range(3):
        with pytest.raises(error) as caught:
            getattr(storage, method)(*arguments)
        assert caught.value is raised
    assert storage.pread(0, 0) == b"" if method != "size" else True


def test_objects_that_break_their_word() -> None:
    memory = Memory(bytes(100))
    storage = PyStorage(memory, True)
    for answer, error in [
        (b"", StorageError),
        (b"x" * 11, ValueError),
        (None, TypeError),
        ("text", TypeError),
    ]:
        memory.pread = lambda length, offset, answer=answer: answer  # type: ignore
        with pytest.raises(error):
            storage.pread(10, 0)
    for count, error in [(0, StorageError), (-1, ValueError), (4, ValueError)]:
        memory.pwrite = lambda buffer, offset, count=count: count  # type: ignore
        with pytest.raises(error):
            storage.pwrite(b"xxx", 0)
    memory.pwrite = lambda buffer, offset: None  # type: ignore
    with pytest.raises((TypeError, AttributeError)):
        storage.pwrite(b"xxx", 0)
    memory.size = lambda: -1  # type: ignore
    with pytest.raises(ValueError):
        storage.size()


def test_a_kept_view_of_a_lent_buffer_is_reported() -> None:
    memory = MemoryInto(bytes(100))
    kept = []

    def keep(buffer: memoryview, offset: int) -> int:
        kept.append(buffer[1:])
        return len(buffer)

    memory.preadinto = keep  # type: ignore[method-assign]
    storage = PyStorage(memory)
    with pytest.raises(BufferError, match="kept"):
        storage.pread(10, 0)
    for view in kept:
        view.release()


def test_objects_are_asked_for_their_methods_at_the_door() -> None:
    class ReadOnly:
        name = "remote"

        def size(self) -> int:
            return 3

        def pread(self, length: int, offset: int) -> bytes:
            return b"abc"[offset : offset + length]

    storage = open_storage(ReadOnly())
    assert storage.name == "remote"
    assert storage.pread(9, 0) == b"abc"
    with pytest.raises(PermissionError):
        storage.pwrite(b"x", 0)
    with pytest.raises(TypeError, match="pwrite, flush, truncate"):
        open_storage(ReadOnly(), writable=True)


def test_a_storage_is_itself_an_object_with_pread(path: Path) -> None:
    path.write_bytes(b"layers")
    with FileStorage(path, True) as inner:
        outer = PyStorage(inner, True)
        assert outer.pread(6, 0) == b"layers"
        outer.pwrite(b"L", 0)
    assert path.read_bytes() == b"Layers"


def test_python_object_from_many_threads() -> None:
    memory = MemoryInto(bytes(160_000))
    storage = PyStorage(memory, True)

    def work(part: int) -> None:
        for turn in range(100):
            storage.pwrite(bytes([part]) * 100, part * 10_000 + turn * 100)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.content == b"".join(bytes([i]) * 10_000 for i in range(16))


def test_the_base_class_answers_for_what_is_left_out() -> None:
    with Storage() as storage:
        for call in (storage.size, lambda: storage.pread(1, 0), lambda: storage.truncate(1)):
            with pytest.raises(ValueError):
                call()
        with pytest.raises(PermissionError):
            storage.pwrite(b"x", 0)
        storage.flush()
