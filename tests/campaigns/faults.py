"""Calls that fail: python -m campaigns.faults [--verb NAME]

For every verb its storage calls are counted, then each is made to fail in turn: with EIO, with
ENOSPC, with a write that leaves its front half; or the disk is full from that call on, for whatever is
tried, until there is room again. Afterwards the file is sound, what the verb did not touch reads as
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
from pathlib import Path
from typing import Any, NamedTuple

from support.stamps import stamped

import qcow2x
from campaigns.guest import prepare
from campaigns.power import SECTOR, Machine, RecordedFile
from campaigns.workloads import SHAPES, SIZE, KiB
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

#: What has no meaning without snapshots, bitmaps and other refcount widths.
_ONLY_V3 = ("bitmap", "amend")


def _start(shape: str, bitmap: bool) -> bytes:
    file = Machine().file(prepare(SIZE, **SHAPES[shape]))
    with qcow2x.open(file, "r+") as image:
        image.snapshots.create("old")
        image.pwrite(stamped(8 * KiB, 16 * KiB, 55), 8 * KiB)
        if bitmap and shape != "v2":
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


def _between(found: bytes, before: bytes, after: bytes) -> bool:
    """Every sector is as before or as after, or zeros where a shrink was on its way."""
    longest = max(len(before), len(after))
    if len(found) not in (len(before), len(after)):
        return False
    before, after = before.ljust(longest, b"\0"), after.ljust(longest, b"\0")
    return all(
        found[at : at + SECTOR] in (before[at : at + SECTOR], after[at : at + SECTOR])
        for at in range(0, len(found), SECTOR)
    )


def _judge(file: RecordedFile, verb: Verb, before: Any, after: Any) -> None:
    file.failing = None
    with qcow2x.open(Machine().file(bytes(file.data)), "r+") as image:
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
    elif content[1:] != before[1:] or not _between(content[0], before[0], after[0]):
        raise Broken("a sector holds neither what it held nor what it was to hold")


def _fail_once(
    start: bytes, verb: Verb, kind: Kind, k: int, before: Any, after: Any
) -> tuple[str, str]:
    """One run with the k-th call failing; returns what the object did then, and at which site."""
    file = Machine().file(start)
    image = qcow2x.open(file, "r+")
    file.failing = range(file.calls + k, FOR_EVER if kind.lasting else file.calls + k + 1)
    file.error, file.half_written, file.reads_fail = kind.error, kind.half_written, not kind.lasting
    outcome = "no error: the call was not needed"
    try:
        verb.do(image)
        image.flush()
    except OSError as exc:
        if isinstance(exc, ImageBroken) or exc.errno != kind.error:
            raise Broken(f"another error than the storage's: {exc!r}") from exc
        try:
            if kind.lasting:
                _stays_full(image, verb, before, after)
                file.failing = None
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
    _judge(file, verb, before, after)
    return outcome, file.failed_at


def _stays_full(image: qcow2x.Image, verb: Verb, before: Any, after: Any) -> None:
    """While there is no room everything can be read, and whoever tries again is told so again."""
    content = _contents(image)
    if verb.whole:
        if content not in (before, after):
            raise Broken("without room, neither what was before nor what comes after is read")
    elif content[1:] != before[1:] or not _between(content[0], before[0], after[0]):
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
FOR_EVER = 1 << 60


def run(names: list[str]) -> tuple[Counts, Counts, list[str]]:
    """(verb, kind, outcome) of every call of every verb on every shape, the same by site instead of
    verb, and what went wrong."""
    outcomes: Counts = collections.Counter()
    sites: Counts = collections.Counter()
    wrong = []
    for shape in ("512", "4096-zstd", "extended-l2", "v2"):
        for name in names:
            if shape == "v2" and name.startswith((*_ONLY_V3, "resize")):
                continue
            verb = VERBS[name]
            start = _start(shape, verb.bitmap)
            calls, before, after = _rehearse(start, verb)
            for kind_name, kind in KINDS.items():
                for k in range(1, calls + 1):
                    try:
                        outcome, site = _fail_once(start, verb, kind, k, before, after)
                    except Exception as exc:
                        outcome, site = WRONG, "any"
                        wrong.append(f"{name} ({shape}), {kind_name} at call {k}: {exc!r}")
                    outcomes[name, kind_name, outcome] += 1
                    sites[site, kind_name, outcome] += 1
    return outcomes, sites, wrong


def _rehearse(start: bytes, verb: Verb) -> tuple[int, Any, Any]:
    file = Machine().file(start)
    with qcow2x.open(file, "r+") as image:
        before = _contents(image)
    file = Machine().file(start)
    image = qcow2x.open(file, "r+")
    opened = file.calls
    verb.do(image)
    image.flush()
    image.close()
    calls = file.calls - opened
    with qcow2x.open(Machine().file(bytes(file.data))) as image:
        return calls, before, _contents(image)


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
    parser.add_argument("--verb", choices=VERBS, action="append")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args(argv)
    outcomes, sites, wrong = run(args.verb or list(VERBS))
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
