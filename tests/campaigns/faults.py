"""Calls that fail: python -m campaigns.faults [--verb NAME]

For every verb, on images of several sorts, its storage calls are counted, then each is made to fail in
turn: with EIO, with ENOSPC, with a write that leaves its front half; or the disk is full from that
call on, for whatever is tried, until there is room again. So with work that opens its files itself
(jobs.py), on each of them. Afterwards the file is sound, what the verb did not touch reads as
before, and the object either works on or refuses to with a clear error. After ENOSPC the same verb
succeeds once there is room. Prints a table and ends with status 1 if not so.
"""

from __future__ import annotations

import argparse
import collections
import errno
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from support.stamps import stamped

import qcow2x
from campaigns.guest import prepare
from campaigns.jobs import JOBS, Files, Job, sound, whole_disk
from campaigns.power import SECTOR, Machine, RecordedFile
from campaigns.workloads import SHAPES, SIZE, KiB
from qcow2x.encryption import Encryption
from qcow2x.errors import ImageBroken


class Verb(NamedTuple):
    """A thing to do to an open image, and what may be found if it was cut short."""

    do: Callable[[qcow2x.Image], object]
    #: Nothing in between: the disk and its snapshots are as before or as after.
    whole: bool = False
    #: Whether the image has a bitmap; one with bitmaps cannot shrink.
    bitmap: bool = True


class Kind(NamedTuple):
    error: int
    half_written: bool
    #: All calls from that one on, but for reads, until the test makes room.
    lasting: bool = False

    def trap(self, file: RecordedFile, k: int) -> None:
        """The k-th of the file's next calls fails."""
        first = file.calls + k
        file.failing = range(first, FOR_EVER if self.lasting else first + 1)
        file.error, file.half_written = self.error, self.half_written
        file.reads_fail = not self.lasting


FOR_EVER = 1 << 60
KINDS = {
    "EIO": Kind(errno.EIO, False),
    "ENOSPC": Kind(errno.ENOSPC, False),
    "short write": Kind(errno.EIO, True),
    "ENOSPC from then on": Kind(errno.ENOSPC, False, lasting=True),
}

PATTERN = stamped(8 * KiB, 24 * KiB, 99)


def _cluster_at(image: qcow2x.Image, offset: int) -> tuple[bytes, int]:
    cluster = image.cluster_size
    at = offset // cluster * cluster
    return stamped(at, cluster, 98), at


VERBS: dict[str, Verb] = {
    "write in place": Verb(lambda image: image.pwrite(PATTERN, 0)),
    "write that allocates": Verb(lambda image: image.pwrite(PATTERN, 56 * KiB)),
    "write, durable at return": Verb(lambda image: image.pwrite(PATTERN, 56 * KiB, fua=True)),
    "write of part of a cluster": Verb(lambda image: image.pwrite(PATTERN[:700], 50 * KiB + 100)),
    "write over a compressed cluster": Verb(lambda image: image.pwrite(b"x" * 512, 72 * KiB)),
    "compressed write": Verb(lambda image: image.pwrite_compressed(*_cluster_at(image, 48 * KiB))),
    "write of zeros": Verb(lambda image: image.write_zeroes(3 * KiB, 30 * KiB)),
    "write of zeros, unmapping": Verb(
        lambda image: image.write_zeroes(3 * KiB, 30 * KiB, unmap=True)
    ),
    "discard": Verb(lambda image: image.discard(16 * KiB, 16 * KiB)),
    "resize, growing": Verb(lambda image: image.resize(3 * SIZE), whole=True),
    "resize, preallocating": Verb(lambda image: image.resize(2 * SIZE, preallocation="metadata")),
    "resize, shrinking": Verb(lambda image: image.resize(20 * KiB, shrink=True), bitmap=False),
    "snapshot create": Verb(lambda image: image.snapshots.create("new"), whole=True),
    "snapshot apply": Verb(lambda image: image.snapshots.apply("old"), whole=True),
    "snapshot delete": Verb(lambda image: image.snapshots.delete("old"), whole=True),
    "bitmap add": Verb(lambda image: image.bitmaps.add("new", 4096), whole=True),
    "bitmap clear": Verb(lambda image: image.bitmaps.clear("mine"), whole=True),
    "bitmap remove": Verb(lambda image: image.bitmaps.remove("mine"), whole=True),
    "bitmap store": Verb(
        lambda image: (image.pwrite(PATTERN, 8 * KiB), image.bitmaps.store()),
    ),
    "amend of the refcount width": Verb(
        lambda image: qcow2x.amend(image, refcount_bits=32), whole=True
    ),
    "amend of features": Verb(lambda image: qcow2x.amend(image, lazy_refcounts=True), whole=True),
    "check": Verb(lambda image: image.check(), whole=True),
    "read": Verb(lambda image: image.pread(SIZE, 0), whole=True),
}


class Sort(NamedTuple):
    """A sort of image that verbs are tried on."""

    #: Of :func:`qcow2x.create`.
    create: dict[str, Any]
    #: Verbs that have no meaning on it, by how their names begin.
    lacks: tuple[str, ...] = ()
    #: Of :func:`qcow2x.open`.
    key: str | None = None
    #: The bytes of its raw backing file.
    backing: bytes | None = None
    #: Calls fail of that file instead of the image's; it is only read.
    below_fails: bool = False

    def options(self, below: RecordedFile | None = None) -> dict[str, Any]:
        """How to open it."""
        options: dict[str, Any] = {"key": self.key}
        if self.backing is not None:
            options["backing"] = below or Machine().file(self.backing)
        return options


_RAW_BACKING = {"cluster_size": 4096, "backing_file": "base.raw", "backing_format": "raw"}
SORTS: dict[str, Sort] = {
    **{shape: Sort(SHAPES[shape]) for shape in ("512", "4096-zstd", "extended-l2")},
    # No bitmaps there and no other refcount widths.
    "v2": Sort(SHAPES["v2"], ("bitmap", "amend", "resize")),
    "luks": Sort(
        {"cluster_size": 4096, "encryption": Encryption(key="one", iter_time_ms=1)},
        ("compressed", "write over a compressed"),
        key="one",
    ),
    "overlay": Sort(_RAW_BACKING, backing=stamped(0, SIZE, 7 << 40)),
    "overlay, its base fails": Sort(
        _RAW_BACKING, backing=stamped(0, SIZE, 7 << 40), below_fails=True
    ),
}


def _start(sort: Sort, bitmap: bool) -> bytes:
    if sort.key is None:
        file = Machine().file(prepare(SIZE, under=sort.options(), **sort.create))
    else:
        file = Machine().file()
        qcow2x.create(file, SIZE, **sort.create)
    with qcow2x.open(file, "r+", **sort.options()) as image:
        if sort.key is not None:
            image.pwrite(stamped(0, 40 * KiB, 1), 0)
        image.snapshots.create("old")
        image.pwrite(stamped(8 * KiB, 16 * KiB, 55), 8 * KiB)
        if bitmap and image.info().compat != "0.10":
            image.bitmaps.add("mine", 512)
            image.pwrite(stamped(30 * KiB, 4 * KiB, 56), 30 * KiB)
    return bytes(file.data)


def _contents(image: qcow2x.Image) -> tuple[bytes, ...]:
    """The disk, and every snapshot in the order of the table."""
    found = [image.pread(image.size, 0)]
    for snapshot in image.snapshots:
        with image.snapshots.open(snapshot.id) as then:
            found.append(then.pread(then.size, 0))
    return tuple(found)


class Broken(AssertionError):
    """What must never be after a failed call."""


def _between(found: bytes, before: bytes, after: bytes, below: bytes | None) -> bool:
    """Every sector is as before or as after; where a shrink was on its way it may be gone: zeros, or
    what the backing file has."""
    longest = max(len(before), len(after))
    if len(found) not in (len(before), len(after)):
        return False
    gone = (below or b"").ljust(longest, b"\0")[len(after) : longest]
    before, shrunk, after = before.ljust(longest, b"\0"), after + gone, after.ljust(longest, b"\0")
    return all(
        found[at : at + SECTOR] in {disk[at : at + SECTOR] for disk in (before, after, shrunk)}
        for at in range(0, len(found), SECTOR)
    )


def _judge(file: RecordedFile, sort: Sort, verb: Verb, before: Any, after: Any) -> None:
    with qcow2x.open(Machine().file(bytes(file.data)), "r+", **sort.options()) as image:
        if image.info().compat == "0.10" and image.check().corruptions:
            # Without a dirty bit, what a snapshot's step left is only mended when asked for.
            image.check(repair="all")
        found = image.check()
        if found.corruptions or found.check_errors:
            raise Broken(f"the file is damaged: {found.findings[0]}")
        content = _contents(image)
    if verb.whole:
        if content not in (before, after):
            raise Broken("neither what was before nor what comes after")
    elif content[1:] != before[1:] or not _between(content[0], before[0], after[0], sort.backing):
        raise Broken("a sector holds neither what it held nor what it was to hold")


def _fail_once(
    start: bytes, sort: Sort, verb: Verb, kind: Kind, k: int, before: Any, after: Any
) -> tuple[str, str]:
    """One run with the k-th call failing; returns what the object did then, and at which site."""
    file, below = Machine().file(start), Machine().file(sort.backing or b"")
    image = qcow2x.open(file, "r+", **sort.options(below))
    victim = below if sort.below_fails else file
    kind.trap(victim, k)
    outcome = "no error: the call was not needed"
    try:
        verb.do(image)
        image.flush()
    except OSError as exc:
        if isinstance(exc, ImageBroken) or exc.errno != kind.error:
            raise Broken(f"another error than the storage's: {exc!r}") from exc
        try:
            if kind.lasting:
                _stays_full(image, sort, verb, before, after)
                victim.failing = None
                # Whatever was half done is settled now.
                image.flush()
            outcome = _goes_on(image, verb, kind, before, after)
        except BaseException:
            with suppress(OSError):
                image.close()
            raise
    try:
        image.close()
    except OSError as exc:
        if outcome.startswith("no error"):
            outcome = "the error comes out of close"
        elif not isinstance(exc, ImageBroken) and exc.errno != kind.error:
            raise Broken(f"close: {exc!r}") from exc
    victim.failing = None
    _judge(file, sort, verb, before, after)
    return outcome, file.site if sort.below_fails else file.failed_at


def _stays_full(image: qcow2x.Image, sort: Sort, verb: Verb, before: Any, after: Any) -> None:
    """While there is no room everything can be read, and whoever tries again is told so again."""
    content = _contents(image)
    if verb.whole:
        if content not in (before, after):
            raise Broken("without room, neither what was before nor what comes after is read")
    elif content[1:] != before[1:] or not _between(content[0], before[0], after[0], sort.backing):
        raise Broken("without room, a sector reads as neither what it was nor what it was to be")
    try:
        verb.do(image)
        image.flush()
    except (LookupError, ValueError):
        # Gone, or there, already.
        pass
    except OSError as exc:
        if isinstance(exc, ImageBroken) or exc.errno != errno.ENOSPC:
            raise Broken(f"without room, the second try: {exc!r}") from exc


def _is_done(image: qcow2x.Image, after: Any) -> bool:
    try:
        return _contents(image) == after
    except ImageBroken:
        return False


def _goes_on(image: qcow2x.Image, verb: Verb, kind: Kind, before: Any, after: Any) -> str:
    # Reading goes on in any case.
    image.pread(image.size, 0)
    if verb.whole and before != after and _is_done(image, after):
        verb = verb._replace(do=lambda image: None)
        outcome = "was done all the same"
    else:
        outcome = "the same again works"
    try:
        verb.do(image)
        image.flush()
    except ImageBroken:
        if kind.error == errno.ENOSPC:
            raise Broken("lack of room made it refuse writes for good") from None
        return "refuses writes from then on"
    except (LookupError, ValueError):
        # Gone, or there, already: what cannot be seen in the contents, such as a bitmap.
        outcome = "was done all the same"
    if _contents(image) != after:
        raise Broken("the second try did not bring about what the verb means")
    return outcome


Counts = collections.Counter[tuple[str, str, str]]
WRONG = "WRONG"


def run(names: list[str]) -> tuple[Counts, Counts, list[str]]:
    """(verb, kind, outcome) of every call of every verb on every shape, the same by site instead of
    verb, and what went wrong."""
    outcomes: Counts = collections.Counter()
    sites: Counts = collections.Counter()
    wrong = []

    def tried(name: str, where: str, kind_name: str, k: int, run: Callable[[], tuple[str, str]]):
        try:
            outcome, site = run()
        except Exception as exc:
            outcome, site = WRONG, "any"
            wrong.append(f"{name} ({where}), {kind_name} at call {k}: {exc!r}")
        outcomes[name, kind_name, outcome] += 1
        sites[site, kind_name, outcome] += 1

    for where, sort in SORTS.items():
        for name in names:
            if name not in VERBS or name.startswith(sort.lacks):
                continue
            verb = VERBS[name]
            start = _start(sort, verb.bitmap)
            calls, before, after = _rehearse(start, sort, verb)
            for kind_name, kind in KINDS.items():
                if sort.below_fails and kind is not KINDS["EIO"]:
                    # Reading is all that is done to it.
                    continue
                for k in range(1, calls + 1):
                    tried(
                        name, where, kind_name, k,
                        partial(_fail_once, start, sort, verb, kind, k, before, after),
                    )  # fmt: skip
    for name in names:
        if name not in JOBS:
            continue
        job = JOBS[name]
        content = job.start()
        all_calls, read_before, read_after = _rehearse_job(job, content)
        for where, calls in all_calls.items():
            for kind_name, kind in KINDS.items():
                for k in range(1, calls + 1):
                    tried(
                        name, where, kind_name, k,
                        partial(_fail_job, job, content, where, kind, k, read_before, read_after),
                    )  # fmt: skip
    return outcomes, sites, wrong


def _rehearse(start: bytes, sort: Sort, verb: Verb) -> tuple[int, Any, Any]:
    file = Machine().file(start)
    with qcow2x.open(file, "r+", **sort.options()) as image:
        before = _contents(image)
    file, below = Machine().file(start), Machine().file(sort.backing or b"")
    image = qcow2x.open(file, "r+", **sort.options(below))
    victim = below if sort.below_fails else file
    opened = victim.calls
    verb.do(image)
    image.flush()
    image.close()
    calls = victim.calls - opened
    with qcow2x.open(Machine().file(bytes(file.data)), **sort.options()) as image:
        return calls, before, _contents(image)


def _files(content: dict[str, bytes]) -> Files:
    return {name: Machine().file(data) for name, data in content.items()}


def _rehearse_job(job: Job, content: dict[str, bytes]) -> tuple[dict[str, int], Any, Any]:
    before = None if job.makes else whole_disk(job, _files(content))
    files = _files(content)
    job.do(files)
    calls = {name: file.calls for name, file in files.items()}
    if not sound(job, files):
        raise Broken("it does not do what it is for")
    return calls, before, whole_disk(job, files)


def _fail_job(
    job: Job, content: dict[str, bytes], where: str, kind: Kind, k: int, before: Any, after: Any
) -> tuple[str, str]:
    files = _files(content)
    victim = files[where]
    kind.trap(victim, k)
    outcome = "no error: the call was not needed"
    try:
        job.do(files)
    except OSError as exc:
        if exc.errno != kind.error:
            raise Broken(f"another error than the storage's: {exc!r}") from exc
        outcome = "the same again works"
    victim.failing = None
    done = outcome != "the same again works"
    if sound(job, files):
        if whole_disk(job, files) not in (before, after):
            raise Broken("the image reads as neither before nor after")
    elif done:
        raise Broken("it told no error and has not done what it is for")
    if not done:
        job.do(files)
        if not sound(job, files) or whole_disk(job, files) != after:
            raise Broken("the second try did not bring about what it is for")
    return outcome, victim.failed_at


def table(title: str, outcomes: Counts) -> str:
    """As Markdown."""
    columns = sorted({outcome for _, _, outcome in outcomes})
    rows = [
        f"| {title} | call fails with | times | {' | '.join(columns)} |",
        "|---|---|---:|" + "---:|" * len(columns),
    ]
    for name in dict.fromkeys(name for name, _, _ in outcomes):
        for kind in KINDS:
            cells = [outcomes[name, kind, outcome] for outcome in columns]
            if sum(cells):
                rows.append(f"| {name} | {kind} | {sum(cells)} | {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m campaigns.faults", description=__doc__)
    parser.add_argument("--verb", choices=[*VERBS, *JOBS], action="append")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args(argv)
    outcomes, sites, wrong = run(args.verb or [*VERBS, *JOBS])
    print(table("verb", outcomes))
    if args.json:
        figures = {
            "verbs": [[*key, count] for key, count in outcomes.items()],
            "sites": [[*key, count] for key, count in sorted(sites.items())],
        }
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{sum(outcomes.values()) - len(wrong)} passed, {len(wrong)} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
