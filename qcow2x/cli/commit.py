"""``commit``: write what an overlay holds into a layer below it."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from qcow2x.cli.copying import why
from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import failure, open_disk
from qcow2x.cli.options import (
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    PROGRESS,
    QUIET,
    Option,
    Parsed,
    cache_mode,
    image_size,
    one_file,
    parse,
)
from qcow2x.cli.report import CommandError
from qcow2x.cli.text import ProgressBar

if TYPE_CHECKING:
    from qcow2x.drivers import Node

OPTIONS = (
    FORMAT,
    Option("t", "cache", "MODE", "cache mode of the images (default: writeback)"),
    Option("b", "base", "BASE", "the layer to write into, which may be further down; means -d"),
    Option("r", "rate-limit", "RATE", "write no more than so many bytes per second"),
    Option("d", "drop", None, "do not empty FILE afterwards"),
    PROGRESS,
    QUIET,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = (
    "[--object OBJECT] [--image-opts] [-q] [-f FMT] [-t MODE] [-b BASE] [-r RATE] [-d] [-p] FILE"
)
OPERANDS = (("FILE", "the overlay whose content goes into its base"),)


def main(argv: list[str]) -> int:
    parsed = parse("commit", USAGE, OPTIONS, argv, OPERANDS)
    rate = image_size(parsed.value("rate-limit") or "0", "rate limit")
    path = one_file(parsed)
    options: dict[str, Any] = {
        "image_opts": parsed.flag("image-opts"),
        "secrets": read_objects(parsed.values("object")),
        "writable": True,
        "cache": cache_mode(parsed),
    }
    quiet = parsed.flag("quiet")
    with ExitStack() as stack:
        node = stack.enter_context(open_disk(path, parsed.value("format"), **options))
        bar = stack.enter_context(ProgressBar(parsed.flag("progress") and not quiet))
        place = _place_of_base(node, path, parsed.value("base"))
        node.close()
        node = _reopened(path, parsed, place, options)
        try:
            _commit(node, place, rate, not parsed.flag("drop") and not parsed.flag("base"), bar)
        except BaseException:
            # What went wrong before is what is to be told.
            with suppress(Exception):
                node.close()
            raise
        _close(node)
    if not quiet:
        print("Image committed.")
    return 0


def _place_of_base(node: Node, path: str, name: str | None) -> str:
    """What stands in front of the base's options among those of the image."""
    from qcow2x.drivers.chain import below, find_backing, option_prefix

    base = below(node) if name is None else find_backing(node, name)
    if base is None and name is not None:
        raise CommandError(f"Did not find '{name}' in the backing chain of '{path}'")
    if base is None:
        raise CommandError("Image does not have a backing file")
    return option_prefix(node, base)


def _reopened(path: str, parsed: Parsed, place: str, options: dict[str, Any]) -> Node:
    """The image with its base open for writing."""
    from qcow2x.drivers import OpenError, open_node

    try:
        return open_node(
            path,
            format=parsed.value("format"),
            options={f"{place}read-only": "off"},
            **options,
        )
    except Exception as exc:
        cause: BaseException = exc
        while isinstance(cause, OpenError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.filename is not None:
            raise CommandError(f"Could not reopen file: {why(cause)}") from exc
        assert isinstance(cause, Exception)
        raise failure(cause) from exc


def _close(node: Node) -> None:
    try:
        node.close()
    except Exception as exc:
        raise failure(exc, "Error while closing the image") from exc


def _commit(node: Node, place: str, rate: int, empty: bool, bar: ProgressBar) -> None:
    from qcow2x.cli.main import is_expected
    from qcow2x.drivers.chain import skip_filters
    from qcow2x.ops.commit import commit_layers
    from qcow2x.ops.emptying import make_empty

    base = node
    for name in place.split(".")[:-1]:
        base = base.children[name]
    top = skip_filters(node).image
    assert top is not None
    depth = next(n for n, layer in enumerate(top.backing_chain) if layer is base.storage)
    try:
        commit_layers(top, base, depth, rate_limit=rate, progress=bar)
    except Exception as exc:
        if not is_expected(exc):
            raise
        raise CommandError(f"Block job failed: {why(exc)}") from exc
    if not empty:
        return
    try:
        make_empty(top)
    except Exception as exc:
        if not is_expected(exc):
            raise
        raise CommandError(f"Failed to empty {node.filename}: {why(exc)}") from exc
