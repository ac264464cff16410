"""Writing what an overlay holds into a layer below it: ``qemu-img commit`` as a function."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcow2x.ops.chain import Link, follow, open_stacked
from qcow2x.ops.copyjob import DATA, KEEP, ZERO, CopyJob
from qcow2x.ops.emptying import make_empty
from qcow2x.ops.pipeline import usable_cpus
from qcow2x.ops.rate import RateLimit
from qcow2x.types import Extent, Progress

if TYPE_CHECKING:
    from qcow2x.image import Image

__all__ = ["CommitResult", "commit", "commit_layers"]

MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class CommitResult:
    """What a commit did; all in bytes of the guest disk."""

    #: What was written into the base as data, and as zeros.
    data_bytes: int
    zero_bytes: int
    #: By how much the base was made longer, to be as long as the overlay.
    grown_by: int
    #: Whether the overlay was emptied afterwards.
    emptied: bool


def commit(
    source: Any,
    base: str | os.PathLike[str] | int | None = None,
    *,
    drop: bool = False,
    references: Any = "deny",
    key: Any = None,
    cache: str = "writeback",
    rate_limit: int | None = None,
    threads: int | None = None,
    lock: bool = True,
    progress: Progress | None = None,
) -> CommitResult:
    """Write all that the image *source*, and the layers between, hold into the layer *base* below.

    *source* is a path, or what else :func:`qcow2x.open` takes, but no open image. *base* says how
    many layers below it is, or which file, by a name that is relative to the folder of the image
    which names it. None: the backing file of *source*, and then *source* itself is emptied once all
    is durable in the base, unless *drop* says that it will not be needed any more.

    The base is made as long as *source* if it is shorter. Layers between *source* and *base* are
    not written to; what they show is not what it was, as they stand on the base. *source* reads the
    same at any time, also when this is cut short at any point and never finished: nothing is
    written to it before the base holds everything durably.

    ``references`` has to allow the layers below to be opened (see :func:`qcow2x.open`), and the base
    to be written to; ``key`` is for all encrypted layers. ``rate_limit`` is in bytes per second.
    ``progress(done, total, phase)`` gets bytes; where it returns False, Cancelled is raised and a
    part was committed, which can be done again. Durable at return.

    Raises ValueError where there is no such layer, and what opening, reading and writing raise.
    """
    with ExitStack() as stack:
        links = _down_to(source, base, references)
        empty = base is None and not drop
        top, bottom = open_stacked(
            stack,
            links,
            top_mode="r+" if empty else "r",
            references=references,
            key=key,
            cache=cache,
            lock=lock,
        )
        return commit_layers(
            top,
            bottom,
            len(links) - 1,
            empty=empty,
            rate_limit=rate_limit,
            threads=threads,
            progress=progress,
        )


def commit_layers(
    top: Image,
    base: Any,
    depth: int,
    *,
    empty: bool = False,
    rate_limit: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> CommitResult:
    """:func:`commit` of layers that are open: *base*, a disk open for writing, is what number
    *depth* of ``top.backing_chain`` reads from. With *empty* the topmost one is emptied, and must
    not be used by anyone else meanwhile."""
    size, old = top.size, base.size
    if old < size:
        base.resize(size)
        base.flush()
    job = _CommitJob(
        source=_Upper(top, depth),
        target=base,
        size=size,
        # What the base got just now reads as zeros.
        zero_from=min(old, size),
        sparse_size=0,
        rate=None if not rate_limit else RateLimit(rate_limit),
        progress=progress,
    )
    job.run(threads or min(usable_cpus(), MAX_THREADS))
    base.flush()
    if empty:
        make_empty(top)
    return CommitResult(job.data_bytes, job.zero_bytes, max(0, size - old), empty)


def _down_to(source: Any, base: Any, references: Any) -> list[Link]:
    """The layers from *source* down to *base*."""
    links: list[Link] = []
    for link in follow(source, references):
        links.append(link)
        if link.reference is not None and _is_wanted(link, len(links) - 1, base):
            return links
    if len(links) == 1:
        raise ValueError(f"{_name(source)}: Image does not have a backing file")
    raise ValueError(f"Did not find '{_name(base)}' in the backing chain of '{_name(source)}'")


def _is_wanted(link: Link, depth: int, base: Any) -> bool:
    if base is None:
        return depth == 1
    if isinstance(base, int):
        return depth == base
    assert link.reference is not None
    name = os.fsdecode(base)
    if link.reference.path is None:
        return link.reference.name == name
    found = os.path.join(os.path.dirname(link.reference.referrer), name)
    return os.path.realpath(found) == os.path.realpath(link.reference.path)


def _name(source: Any) -> str:
    return str(source if isinstance(source, (str, os.PathLike, int)) else type(source).__name__)


class _Upper:
    """What is to be committed: the disk as the topmost layer shows it, with the extents of all
    layers above the base."""

    format = "qcow2"

    def __init__(self, top: Image, depth: int) -> None:
        self._top = top
        self.depth = depth
        self.size = top.size
        self.cluster_size = top.cluster_size
        self.backing_chain = top.backing_chain[:depth]

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        return self._top.extents(offset, length, layers=self.depth)

    def preadinto(self, buffer: Any, offset: int) -> int:
        return self._top.preadinto(buffer, offset)


class _CommitJob(CopyJob):
    """A copy into a base that has the rest already. Zeros are written where the layers say that
    there are some, and are not looked for in data."""

    phase = "commit"
    cancelled = "commit cancelled; the image is as it was, its base has a part of it"

    def kind_of(self, extent: Extent) -> str:
        if extent.depth == self.source.depth:
            return KEEP
        return ZERO if extent.zero or not extent.data else DATA
