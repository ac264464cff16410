"""``snapshot``: list, make, apply and delete internal snapshots."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Any

from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import failure, open_disk, stored_in
from qcow2x.cli.options import (
    IMAGE_OPTS,
    OBJECT,
    QUIET,
    SHARE,
    Option,
    UsageError,
    one_file,
    parse,
)
from qcow2x.cli.report import CommandError, report
from qcow2x.cli.text import snapshot_lines
from qcow2x.cli.words import misplaced_l1, reason

if TYPE_CHECKING:
    from qcow2x.drivers import Node

OPTIONS = (
    Option("l", "", None, "list the snapshots (needs no right to write)"),
    Option("c", "", "NAME", "make a snapshot of the disk as it is"),
    Option("a", "", "SNAPSHOT", "make the disk what it was; what was written since is lost"),
    Option("d", "", "SNAPSHOT", "delete a snapshot"),
    QUIET,
    SHARE,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = "[--object OBJECT] [--image-opts] [-U] [-q] [-l | -a SNAPSHOT | -c NAME | -d SNAPSHOT] FILE"
OPERANDS = (
    ("FILE", "the image"),
    ("SNAPSHOT", "an id or a name"),
)

#: QEMU keeps names in buffers of this size, with a NUL at the end.
_MAX_NAME_BYTES = 255


def main(argv: list[str]) -> int:
    parsed = parse("snapshot", USAGE, OPTIONS, argv, OPERANDS)
    actions = [pair for pair in parsed.pairs if pair[0] in ("l", "a", "c", "d")]
    if len(actions) > 1:
        raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")
    path = one_file(parsed)
    action, name = actions[0] if actions else ("", "")
    with open_disk(
        path,
        image_opts=parsed.flag("image-opts"),
        secrets=read_objects(parsed.values("object")),
        writable=action != "l",
        force_share=parsed.flag("force-share"),
    ) as node:
        if action == "l":
            _list(node)
        elif action == "c":
            _create(node, name)
        elif action == "a":
            _apply(node, name)
        elif action == "d":
            _delete(node, name)
    return 0


def _image(node: Node) -> Any:
    """The image whose snapshots are meant: that of the node, or of what it filters."""
    while node.is_filter and node.file is not None:
        node = node.file
    return node.image


def _list(node: Node) -> None:
    from qcow2x.cli.info import snapshot_members

    image = _image(node)
    if image is not None and len(image.snapshots):
        print("Snapshot list:")
        print("\n".join(snapshot_lines([snapshot_members(entry) for entry in image.snapshots])))


def _create(node: Node, name: str) -> None:
    kept = os.fsdecode(os.fsencode(name)[:_MAX_NAME_BYTES])
    image = _image(node)
    doing = f"Could not create snapshot '{name}'"
    if image is None or image._header.has_data_file:
        raise CommandError(f"{doing}: {os.strerror(errno.ENOTSUP)}")
    try:
        # A guest that records its instructions would give their number; without one it is 0.
        image.snapshots.create(kept, icount=0)
    except Exception as exc:
        raise CommandError(f"{doing}: {os.strerror(_errno_of(exc))}") from exc


def _errno_of(exc: Exception) -> int:
    """The one word that QEMU has for what went wrong with a new snapshot."""
    from qcow2x.cli.main import is_expected
    from qcow2x.cli.words import number
    from qcow2x.errors import CorruptImage, FormatError, UnsupportedFeature

    if not is_expected(exc):
        raise exc
    if isinstance(exc, CorruptImage):
        # Where a cluster in use has no refcount, QEMU is left with that of its own retries.
        return errno.EAGAIN if exc.site == "refblock_update" else errno.EIO
    if isinstance(exc, UnsupportedFeature):
        return errno.EFBIG if "the snapshot table is full" in str(exc) else errno.EINVAL
    if isinstance(exc, FormatError):
        return errno.EFBIG
    return number(exc) or errno.EINVAL


def _apply(node: Node, name: str) -> None:
    image = _image(node)
    doing = f"Could not apply snapshot '{name}'"
    if image is None:
        raise CommandError(f"{doing}: Block driver does not support internal snapshots")
    try:
        image.snapshots.apply(name)
    except KeyError:
        why = os.strerror(errno.ENOENT)
        raise CommandError(f"{doing}: Failed to load snapshot: {why}") from None
    except Exception as exc:
        if unusable := misplaced_l1(exc):
            report(reason(exc))
            why = os.strerror(unusable)
            raise CommandError(f"{doing}: Failed to load snapshot: {why}") from exc
        raise failure(exc, f"{doing}: Failed to load snapshot", stored_in(node)) from exc


def _delete(node: Node, name: str) -> None:
    image = _image(node)
    doing = f"Could not delete snapshot '{name}'"
    # By name alone: an id that looks like a name is somebody else's snapshot.
    found = [] if image is None else [entry for entry in image.snapshots if entry.name == name]
    if not found:
        raise CommandError(f"{doing}: snapshot not found")
    before = image._header.nb_snapshots
    try:
        image.snapshots.delete(found[0].id)
    except Exception as exc:
        if isinstance(exc, OSError) and image._header.nb_snapshots < before:
            # It is gone; its clusters have leaked.
            print(f"qcow2_free_clusters failed: {reason(exc)}", file=sys.stderr)
            doing += ": Failed to free the cluster and L1 table"
        raise failure(exc, doing, stored_in(node)) from exc
