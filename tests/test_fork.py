"""A process that forks with images open: the parent goes on as if nothing had happened; in the child
its images are closed, without a byte written, and may be opened anew whatever threads were at."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.qemu import check_clean, compare_bytes
from support.stamps import stamped

import qcow2x

KiB = 1 << 10
MiB = 1 << 20
HANG = 60


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    faulthandler.dump_traceback_later(2 * HANG, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def in_child(job: Callable[[], None]) -> None:
    """Runs it in a child, which must end well."""
    with child(job):
        pass


@contextmanager
def child(job: Callable[[], None]) -> Iterator[None]:
    """The same, beside what the parent does meanwhile."""
    number = os.fork()
    if number == 0:
        status = 1
        try:
            # The parent's watchdog is a thread, which is not here.
            signal.alarm(HANG)
            job()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield
    finally:
        _, status = os.waitpid(number, 0)
    assert status == 0


def make(path: Path, size: int = MiB, **options: int) -> Path:
    qcow2x.create(path, size, cluster_size=4096, **options)
    return path


def refused(image: qcow2x.Image) -> None:
    """Whatever is asked of it raises, and says why."""
    assert image.closed
    for request in (
        lambda: image.pread(1, 0),
        lambda: image.preadv_many([(bytearray(512), 0), (bytearray(512), 4096)]),
        lambda: image.pwrite(b"child", 0),
        lambda: image.pwrite_compressed(bytes(4096), 0),
        lambda: image.write_zeroes(0, 4096),
        lambda: image.discard(0, 4096),
        lambda: image.resize(2 * MiB),
        lambda: image.vmstate_pwrite(b"child", 0),
        image.flush,
        image.check,
        lambda: list(image.extents()),
        lambda: image.snapshots.create("child"),
        lambda: image.bitmaps.add("child"),
    ):
        with pytest.raises(ValueError, match="closed") as caught:
            request()
        assert "open it anew" in str(caught.value) or "storage" in str(caught.value)


@pytest.mark.parametrize("lazy", [0, 1])
def test_a_child_writes_nothing_of_its_parents_images(tmp_path: Path, lazy: int) -> None:
    """Not when it uses them, nor when it closes or forgets them."""
    path = make(tmp_path / "disk.qcow2", lazy_refcounts=lazy)
    image = qcow2x.open(path, "r+")
    image.bitmaps.add("marks", 4096)
    image.pwrite(stamped(0, 64 * KiB, 1), 0)
    image.discard(4096, 4096)
    before = path.read_bytes()

    def use() -> None:
        nonlocal image
        refused(image)
        image.close()
        image.close()
        refused(image)
        # Nor does its end, which closes an image that nobody closed.
        del image

    in_child(use)
    assert path.read_bytes() == before
    image.pwrite(stamped(128 * KiB, 4096, 2), 128 * KiB)
    image.flush()
    image.close()
    check_clean(path)
    expected = bytearray(MiB)
    expected[: 64 * KiB] = stamped(0, 64 * KiB, 1)
    expected[4096:8192] = bytes(4096)
    expected[128 * KiB : 132 * KiB] = stamped(128 * KiB, 4096, 2)
    compare_bytes(path, expected)
    with qcow2x.open(path) as after:
        assert after.bitmaps["marks"].count == 64 * KiB + 4096


def test_a_child_that_ends_as_any_program_does(tmp_path: Path) -> None:
    """The interpreter's own end, with the image in a global variable and in a cycle."""
    path = make(tmp_path / "disk.qcow2")
    program = """
import os, pathlib, sys, qcow2x
path = pathlib.Path(sys.argv[1])
image = qcow2x.open(sys.argv[1], "r+")
image.pwrite(b"parent", 0)
cycle = [image]
cycle.append(cycle)
before = path.read_bytes()
if os.fork() == 0:
    sys.exit(0)
assert os.wait()[1] == 0
assert path.read_bytes() == before
image.pwrite(b"again", 4096)
image.close()
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, path],
        env=env, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    check_clean(path)
    with qcow2x.open(path) as image:
        assert image.pread(6, 0) + image.pread(5, 4096) == b"parentagain"


def test_locks_of_the_file_stay_the_parents(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2")
    image = qcow2x.open(path, "r+")
    in_child(image.close)
    with pytest.raises(qcow2x.ImageLocked):
        qcow2x.open(path, "r+")
    # And no child that lives on keeps them.
    over_read, over_write = os.pipe()

    def wait() -> None:
        os.close(over_write)
        os.read(over_read, 1)

    with child(wait):
        os.close(over_read)
        image.close()
        qcow2x.open(path, "r+").close()
        os.close(over_write)


def test_a_child_opens_what_its_parents_threads_are_writing_to(tmp_path: Path) -> None:
    """Compressing, decompressing and reading many at once, forked at any instant of that."""
    path = make(tmp_path / "disk.qcow2", 4 * MiB)
    fixed = make(tmp_path / "fixed.qcow2", 4 * MiB)
    data = stamped(0, MiB, 9)
    with qcow2x.open(fixed, "r+") as image:
        image.pwrite_compressed(data[: MiB // 2], 0)
        image.pwrite(data[MiB // 2 :], MiB // 2)
    over = threading.Event()
    failures: list[BaseException] = []
    model: dict[int, bytes] = {}

    def write(image: qcow2x.Image, number: int) -> None:
        turn = 0
        try:
            while not over.is_set():
                turn += 1
                at = (turn * 4 + number) % 1024 * 4096
                model[at] = stamped(at, 4096, turn)
                if turn % 3:
                    image.pwrite(model[at], at)
                else:
                    image.pwrite_compressed(model[at], at)
                assert image.pread(4096, at) == model[at]
                image.preadv_many([(bytearray(4096), n * 4096) for n in range(8)])
                if turn % 16 == 0:
                    image.flush()
        except BaseException as exc:
            failures.append(exc)

    def use(number: int) -> None:
        with qcow2x.open(fixed, lock=False) as image:
            assert image.pread(MiB, 0) == data
            buffers = [bytearray(4096) for _ in range(16)]
            image.preadv_many([(b, n * 64 * KiB) for n, b in enumerate(buffers)])
            for n, buffer in enumerate(buffers):
                assert buffer == data[n * 64 * KiB :][:4096]
        own = make(tmp_path / f"own{number}.qcow2")
        with qcow2x.open(own, "r+") as image:
            image.pwrite_compressed(data[:8192], 0)
            image.pwrite(b"own", 100_000)
            assert image.pread(8192, 0) == data[:8192]

    with qcow2x.open(path, "r+", cache="writethrough") as image:
        jobs = [threading.Thread(target=write, args=(image, n)) for n in range(4)]
        for job in jobs:
            job.start()
        try:
            for number in range(25):
                with child(lambda n=number: use(n)):
                    time.sleep(0.002)
        finally:
            over.set()
            for job in jobs:
                job.join()
    assert not failures, failures[0]
    check_clean(path)
    expected = bytearray(4 * MiB)
    for at, written in model.items():
        expected[at : at + 4096] = written
    compare_bytes(path, expected)
    for number in range(25):
        check_clean(tmp_path / f"own{number}.qcow2")


def test_a_fork_while_every_lock_is_held(tmp_path: Path) -> None:
    """By threads that are not in the child; it closes its images nevertheless, and opens them."""
    path = make(tmp_path / "disk.qcow2")
    image = qcow2x.open(path, "r+")
    image.pwrite(b"x", 0)
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with image._exclusive:
            image._freeze()
            held.set()
            over.wait(HANG)
            image._thaw()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(HANG)
    # One more, that waits for the first.
    waiter = threading.Thread(target=lambda: image.pwrite(b"late", 4096))
    waiter.start()

    def use() -> None:
        image.close()
        refused(image)
        with qcow2x.open(path, lock=False) as anew:
            anew.pread(10, 0)

    in_child(use)
    over.set()
    holder.join(HANG)
    waiter.join(HANG)
    assert image.pread(4, 4096) == b"late"
    image.close()
    check_clean(path)


def test_rings_of_the_parent_stay_its_own(tmp_path: Path) -> None:
    """What reads many at once is made anew in the child, and the parent's is let go of."""
    path = make(tmp_path / "disk.qcow2")
    data = stamped(0, MiB, 4)
    with qcow2x.open(path, "r+") as image:
        image.pwrite(data, 0)

    def read(image: qcow2x.Image) -> None:
        buffers = [bytearray(4096) for _ in range(64)]
        image.preadv_many([(b, n * 16 * KiB) for n, b in enumerate(buffers)])
        for n, buffer in enumerate(buffers):
            assert buffer == data[n * 16 * KiB :][:4096]

    def rings() -> int:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum("io_uring" in os.readlink(link) for link in links if link.is_symlink())

    with qcow2x.open(path) as image:
        read(image)
        made = rings()

        def use() -> None:
            with qcow2x.open(path) as anew:
                for _ in range(20):
                    read(anew)
            assert rings() == min(made, 1)

        with child(use):
            for _ in range(20):
                read(image)
        assert rings() == made


def _of_a_pool(path: str) -> tuple[str, bytes]:
    assert SHARED is not None
    try:
        SHARED.pread(1, 0)
    except ValueError as exc:
        with qcow2x.open(path, lock=False) as image:
            return str(exc), image.pread(6, 0)
    return "", b""


SHARED: qcow2x.Image | None = None


def test_a_pool_of_processes(tmp_path: Path) -> None:
    global SHARED
    path = make(tmp_path / "disk.qcow2")
    with qcow2x.open(path, "r+") as image:
        image.pwrite(b"pooled", 0)
        image.flush()
        SHARED = image
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for said, read in pool.map(_of_a_pool, [str(path)] * 4):
                assert "open it anew" in said
                assert read == b"pooled"
    SHARED = None
    check_clean(path)


def test_layers_and_snapshots_are_left_as_well(tmp_path: Path) -> None:
    make(tmp_path / "base.qcow2")
    top = tmp_path / "top.qcow2"
    qcow2x.create(top, MiB, backing_file="base.qcow2", backing_format="qcow2")
    with qcow2x.open(top, "r+", references="follow") as image:
        made = image.snapshots.create("then")
        with image.snapshots.open(made.id) as then:
            base = image.backing
            assert isinstance(base, qcow2x.Image)

            def use() -> None:
                for each in (then, base):
                    assert each.closed
                    with pytest.raises(ValueError, match="open it anew"):
                        each.pread(1, 0)
                    each.close()

            in_child(use)
            assert then.pread(10, 0) == base.pread(10, 0) == bytes(10)
        image.pwrite(b"x", 0)
    check_clean(top)
