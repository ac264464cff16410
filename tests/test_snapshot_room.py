"""Lack of room in the middle of a snapshot's step is not for good."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest
from campaigns.guest import prepare
from campaigns.power import Machine
from support.stamps import stamped

import qcow2x
from qcow2x.errors import ImageBroken

SIZE = 64 << 10


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
def test_the_same_again_works_once_there_is_room(verb: str, compat: str) -> None:
    start = Machine().file(prepare(SIZE, cluster_size=1024, compat=compat))
    with qcow2x.open(start, "r+") as image:
        image.snapshots.create("old")
        old = image.pread(SIZE, 0)
        image.pwrite(stamped(4096, 8192, 5), 4096)
    for call in range(1, 60):
        file = Machine().file(bytes(start.data))
        with qcow2x.open(file, "r+") as image:
            disk = image.pread(SIZE, 0)
            step = getattr(image.snapshots, verb)
            name = "new" if verb == "create" else "old"
            file.error, file.failing = errno.ENOSPC, range(file.calls + call, 1 << 30)
            try:
                step(name)
            except OSError as exc:
                assert exc.errno == errno.ENOSPC
            else:
                file.failing = None
                break
            # No room for anything: reads go on.
            file.failing = None
            assert image.pread(SIZE, 0) in (disk, old)
            with suppress(KeyError):
                # Raised where it is gone already.
                step(name)
            image.pwrite(b"x" * 512, 0)
            image.flush()
            found = image.check()
            assert not found.corruptions and not found.check_errors, found.findings
            assert ("old" in [s.name for s in image.snapshots]) == (verb != "delete")
    else:
        pytest.fail("the step has more calls than were tried")
    assert call > 10


@pytest.mark.parametrize("verb", ["create", "apply", "delete"])
def test_a_guest_goes_on_once_there_is_room(verb: str) -> None:
    """Without another change of the snapshots: with the next flush, or by the close."""
    start = Machine().file(prepare(SIZE, cluster_size=1024))
    with qcow2x.open(start, "r+") as image:
        image.snapshots.create("old")
        old = image.pread(SIZE, 0)
        image.pwrite(stamped(4096, 8192, 5), 4096)
    for call in range(1, 60):
        file = Machine().file(bytes(start.data))
        image = qcow2x.open(file, "r+")
        disk = image.pread(SIZE, 0)
        file.error, file.reads_fail = errno.ENOSPC, False
        file.failing = range(file.calls + call, 1 << 30)
        try:
            getattr(image.snapshots, verb)("new" if verb == "create" else "old")
        except OSError as exc:
            assert exc.errno == errno.ENOSPC
        else:
            file.failing = None
            image.close()
            break
        # A full disk can be read, snapshots and all, and says what it is in want of.
        names = [snapshot.name for snapshot in image.snapshots]
        with suppress(KeyError), image.snapshots.open("old") as then:
            assert then.pread(SIZE, 0) == old
        with pytest.raises(OSError) as told:
            image.pwrite(b"y" * 512, 0)
            image.flush()
        assert told.value.errno == errno.ENOSPC or isinstance(told.value, ImageBroken)
        file.failing = None
        if call % 2:
            image.flush()
            image.pwrite(b"x" * 512, 0)
            image.flush()
            assert not image.check().corruptions
        image.close()
        with qcow2x.open(file) as image:
            # What was reserved for a table may have leaked.
            assert not image.check().corruptions, (call, names)
            assert image.pread(SIZE - 512, 512) in (disk[512:], old[512:])
    assert call > 10


def test_another_failure_than_lack_of_room_stays_one() -> None:
    file = Machine().file(prepare(SIZE, cluster_size=1024))
    for call in range(1, 40):
        tried = Machine().file(bytes(file.data))
        image = qcow2x.open(tried, "r+")
        tried.failing = range(tried.calls + call, tried.calls + call + 1)
        try:
            image.snapshots.create("new")
        except OSError:
            tried.failing = None
            try:
                image.snapshots.create("again")
            except ImageBroken:
                with suppress(ImageBroken):
                    image.close()
                return
        image.close()
    pytest.fail("no call made the image refuse writes")
