"""``bitmap``: change the persistent dirty bitmaps of an image."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import failure, open_disk, stored_in
from qcow2x.cli.options import FORMAT, IMAGE_OPTS, OBJECT, Option, image_size, parse
from qcow2x.cli.report import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qcow2x.drivers import Node

OPTIONS = (
    Option("", "add", None, "make the bitmap; with -g of this granularity"),
    Option("", "remove", None, "remove it, also if it cannot be used any more"),
    Option("", "clear", None, "clear all of its bits"),
    Option("", "enable", None, "have writes set bits in it from now on"),
    Option("", "disable", None, "leave it as it is from now on"),
    Option("", "merge", "SOURCE", "set the bits in it that are set in bitmap SOURCE"),
    Option("g", "granularity", "SIZE", "bytes of the disk that one bit of --add stands for"),
    Option("b", "source-file", "FILE", "the image that the SOURCE of --merge is in"),
    Option("F", "source-format", "FMT", "format of that image"),
    FORMAT,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = (
    "(--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [-b FILE [-F FMT]] "
    "[-g SIZE] [--object OBJECT] [--image-opts | -f FMT] FILE BITMAP"
)
OPERANDS = (
    ("FILE", "the image"),
    ("BITMAP", "the name of the bitmap"),
)

_ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")
_DEFAULT_GRANULARITY = 65536
_MIN_DEFAULT_GRANULARITY = 4096


def main(argv: list[str]) -> int:
    parsed = parse("bitmap", USAGE, OPTIONS, argv, OPERANDS)
    given = parsed.value("granularity")
    granularity = 0 if given is None else image_size(given, "granularity")
    actions = [(key, value) for key, value in parsed.pairs if key in _ACTIONS]
    names = {key for key, _ in actions}
    source = parsed.value("source-file")
    if not actions:
        raise CommandError(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
        )
    if granularity and "add" not in names:
        raise CommandError("granularity only supported with --add")
    if parsed.value("source-format") is not None and source is None:
        raise CommandError("-F only supported with -b")
    if source is not None and "merge" not in names:
        raise CommandError("Merge bitmap source file only supported with --merge")
    if len(parsed.args) != 2:
        raise CommandError("Expecting filename and bitmap name")
    path, bitmap = parsed.args
    secrets = read_objects(parsed.values("object"))
    with ExitStack() as stack:
        # What is below an image says nothing of its bitmaps, so it is not opened.
        node = stack.enter_context(
            open_disk(
                path,
                parsed.value("format"),
                image_opts=parsed.flag("image-opts"),
                secrets=secrets,
                writable=True,
                backing=False,
            )
        )
        other = node
        if source is not None:
            other = stack.enter_context(
                open_disk(source, parsed.value("source-format"), secrets=secrets, backing=False)
            )
        for action, value in actions:
            try:
                _ACTION[action](node, bitmap, other, value or granularity)
            except Exception as exc:
                doing = f"Operation {action} on bitmap {bitmap} failed"
                raise failure(exc, doing, stored_in(node)) from exc
    return 0


# ---- One action each: the node, the bitmap, the other node, the option's value --------------------


def _add(node: Node, name: str, _: Node, granularity: int) -> None:
    if not name:
        raise CommandError("Bitmap name cannot be empty")
    if node.image is None:
        raise CommandError(f"Cannot store dirty bitmaps in {node.filename}")
    if not granularity:
        granularity = max(_MIN_DEFAULT_GRANULARITY, node.image.cluster_size)
        granularity = min(_DEFAULT_GRANULARITY, granularity)
    node.image.bitmaps.add(name, granularity)


def _remove(node: Node, name: str, _: Node, __: Any) -> None:
    _find(node, name).remove(name)


def _clear(node: Node, name: str, _: Node, __: Any) -> None:
    _usable(node, name).clear(name)


def _enable(node: Node, name: str, _: Node, __: Any) -> None:
    _usable(node, name).enable(name)


def _disable(node: Node, name: str, _: Node, __: Any) -> None:
    _usable(node, name).disable(name)


def _merge(node: Node, name: str, other: Node, source: str) -> None:
    bitmaps = _usable(node, name)
    _usable(other, source)
    if other.size != node.size:
        raise CommandError(
            f"Bitmaps are of different sizes (destination size is {node.size}, source size is "
            f"{other.size}) and can't be merged"
        )
    bitmaps.merge(name, [source if other is node else (other.image, source)])


_ACTION: dict[str, Callable[[Node, str, Node, Any], None]] = {
    "add": _add,
    "remove": _remove,
    "clear": _clear,
    "enable": _enable,
    "disable": _disable,
    "merge": _merge,
}


def _find(node: Node, name: str) -> Any:
    if node.image is None or name not in node.image.bitmaps:
        raise CommandError(f"Dirty bitmap '{name}' not found")
    return node.image.bitmaps


def _usable(node: Node, name: str) -> Any:
    from qcow2x.errors import CorruptImage

    bitmaps = _find(node, name)
    try:
        bitmaps.require_usable(name)
    except CorruptImage:
        raise CommandError(
            f"Bitmap '{name}' is inconsistent and cannot be used",
            hint="Try block-dirty-bitmap-remove to delete this bitmap from disk",
        ) from None
    return bitmaps
