"""Work that opens its files itself, for campaigns.faults: on each of them every call is made to fail."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from support.stamps import stamped

import qcow2x
from campaigns.guest import prepare
from campaigns.power import Machine, RecordedFile
from campaigns.repairs import harmed
from campaigns.workloads import SIZE, KiB
from qcow2x.encryption import Encryption
from qcow2x.errors import FormatError

Files = dict[str, RecordedFile]
TOP, BASE, OTHER = "top.qcow2", "base.qcow2", "other.qcow2"


class Job(NamedTuple):
    """What is done to files, of which TOP is the image that is looked at."""

    start: Callable[[], dict[str, bytes]]
    do: Callable[[Files], object]
    #: Opens the image, besides the files below it.
    key: str | None = None
    #: Before the job is done there may be no image at all.
    makes: bool = False
    #: The image contradicts itself until the job is done.
    mends: bool = False


def among(files: Files) -> dict[str, Any]:
    """How to open an image whose backing files are among these."""
    return {"references": lambda reference: files.get(reference.name)}


def whole_disk(job: Job, files: Files) -> bytes:
    with qcow2x.open(files[TOP], key=job.key, **among(files)) as image:
        return image.pread(image.size, 0)


def _chain() -> dict[str, bytes]:
    """An overlay that has changed parts of its base, and a file that may become its base."""
    rng = random.Random(4)
    files: Files = {TOP: Machine().file()}
    for name, filled in ((BASE, 0.6), (OTHER, 0.3)):
        files[name] = Machine().file(prepare(SIZE, cluster_size=1024, filled=filled))
    qcow2x.create(files[TOP], SIZE, cluster_size=512, backing_file=BASE, backing_format="qcow2")
    with qcow2x.open(files[TOP], "r+", **among(files)) as image:
        for sequence in range(6):
            offset = rng.randrange(SIZE // KiB) * KiB
            image.pwrite(stamped(offset, KiB, sequence), offset)
        image.write_zeroes(8 * KiB, 4 * KiB)
    return {name: bytes(file.data) for name, file in files.items()}


def _create(**options: Any) -> Callable[[Files], object]:
    return lambda files: qcow2x.create(files[TOP], SIZE, **options)


def _nothing() -> dict[str, bytes]:
    return {TOP: b""}


def _damaged(shape: str) -> Callable[[], dict[str, bytes]]:
    return lambda: {TOP: harmed(random.Random(7), shape)}


def _commit(files: Files) -> None:
    qcow2x.commit(files[TOP], threads=1, **among(files))


def _rebase(files: Files) -> None:
    qcow2x.rebase(files[TOP], OTHER, backing_format="qcow2", threads=1, **among(files))


JOBS: dict[str, Job] = {
    "create": Job(_nothing, _create(), makes=True),
    "create, metadata preallocated": Job(
        _nothing, _create(cluster_size=512, preallocation="metadata"), makes=True
    ),
    "create, fully preallocated": Job(
        _nothing, _create(cluster_size=4096, preallocation="full"), makes=True
    ),
    "create with LUKS": Job(
        _nothing,
        # The fewest iterations that are allowed.
        _create(cluster_size=4096, encryption=Encryption(key="one", iter_time_ms=1)),
        key="one",
        makes=True,
    ),
    "commit": Job(_chain, _commit),
    "rebase": Job(_chain, _rebase),
    **{
        f"repair, {shape}": Job(
            _damaged(shape), lambda files: qcow2x.check(files[TOP], repair="all"), mends=True
        )
        for shape in ("512", "4096-zstd", "extended-l2")
    },
}


def sound(job: Job, files: Files) -> bool:
    """Whether the files are right; of an image that was not made whole, whether it says so."""
    for file in files.values():
        if job.makes and not file.data:
            return False
        try:
            found = qcow2x.check(file)
        except FormatError:
            if job.makes:
                return False
            raise
        if found.corruptions or found.check_errors:
            if job.makes or job.mends:
                return False
            raise AssertionError(f"a file is damaged: {found.findings[0]}")
    return True
