"""``rebase``: give an image another backing file."""

from __future__ import annotations

from contextlib import ExitStack
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
    SHARE,
    Option,
    Parsed,
    UsageError,
    cache_mode,
    parse,
)
from qcow2x.cli.report import CommandError
from qcow2x.cli.text import ProgressBar

if TYPE_CHECKING:
    from qcow2x.drivers import Node

OPTIONS = (
    FORMAT,
    Option("t", "cache", "MODE", "cache mode of the image (default: writeback)"),
    Option("T", "src-cache", "MODE", "cache mode of the new backing file (default: writeback)"),
    Option("b", "backing", "BACKING", "the new backing file; '' for none"),
    Option("F", "backing-format", "FMT", "format of the new backing file"),
    Option("u", "unsafe", None, "only write the name: the content of the disk may change"),
    Option("c", "compress", None, "compress what has to be written into the image"),
    PROGRESS,
    QUIET,
    SHARE,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = (
    "[--object OBJECT] [--image-opts] [-U] [-q] [-f FMT] [-t MODE] [-T MODE] [-p] [-u] [-c] "
    "-b BACKING [-F FMT] FILE"
)
OPERANDS = (("FILE", "the overlay"),)


def main(argv: list[str]) -> int:
    parsed = parse("rebase", USAGE, OPTIONS, argv, OPERANDS)
    if len(parsed.args) != 1:
        raise UsageError("Expecting one image file name")
    unsafe, name = parsed.flag("unsafe"), parsed.value("backing")
    if not unsafe and name is None:
        raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")
    secrets = read_objects(parsed.values("object"))
    with ExitStack() as stack:
        bar = stack.enter_context(ProgressBar(parsed.flag("progress") and not parsed.flag("quiet")))
        cache = cache_mode(parsed)
        src_cache = cache_mode(parsed, "src-cache", "source cache")
        node = stack.enter_context(
            open_disk(
                parsed.args[0],
                parsed.value("format"),
                image_opts=parsed.flag("image-opts"),
                secrets=secrets,
                writable=True,
                cache=cache,
                discard=False,
                backing=not unsafe,
            )
        )
        _check(node, parsed)
        if not unsafe:
            new, shared = None, None
            if name:
                new, shared = _new_backing(stack, node, parsed, src_cache, secrets)
            _refuse_unknown_format(name, parsed)
            _copy(node, new, shared, parsed.flag("compress"), bar)
        _refuse_unknown_format(name, parsed)
        _change(node, name or None, parsed.value("backing-format"))
    return 0


def _check(node: Node, parsed: Parsed) -> None:
    from qcow2x.drivers import OptionError
    from qcow2x.drivers.chain import skip_filters
    from qcow2x.drivers.registry import find_driver

    if parsed.flag("compress") and skip_filters(node).image is None:
        raise CommandError("Compression not supported for this file format")
    format = parsed.value("backing-format")
    if format is not None:
        try:
            find_driver(format)
        except OptionError:
            raise CommandError(f"Invalid format name: '{format}'") from None


def _refuse_unknown_format(name: str | None, parsed: Parsed) -> None:
    if name and parsed.value("backing-format") is None:
        raise _cannot_change(name, "backing format must be specified")


def _cannot_change(name: str | None, reason: str) -> CommandError:
    return CommandError(f"Could not change the backing file to '{name or '(null)'}': {reason}")


def _new_backing(
    stack: ExitStack, node: Node, parsed: Parsed, cache: str, secrets: dict[str, bytes]
) -> tuple[Any, int | None]:
    """The new backing file as a disk, and its number in the chain if it is there already."""
    from qcow2x.drivers import naming, open_node
    from qcow2x.drivers.chain import find_backing, skip_filters

    name = parsed.value("backing") or ""
    try:
        full = naming.full_backing_name(node.filename, name)
    except Exception as exc:
        raise failure(exc, "Could not resolve backing filename") from exc
    found = find_backing(node, full)
    top = skip_filters(node).image
    if found is not None and top is not None:
        chain = top.backing_chain
        return found, next(n for n, layer in enumerate(chain) if layer is found.storage)
    try:
        new = open_node(
            full,
            format=parsed.value("backing-format"),
            cache=cache,
            force_share=parsed.flag("force-share"),
            secrets=secrets,
        )
    except Exception as exc:
        raise failure(exc, f"Could not open new backing file '{name}'") from exc
    return stack.enter_context(new), None


def _copy(node: Node, new: Any, shared: int | None, compress: bool, bar: ProgressBar) -> None:
    from qcow2x.cli.main import is_expected
    from qcow2x.drivers.chain import skip_filters
    from qcow2x.ops.rebase import rebase_layers

    image = skip_filters(node).image
    if image is None:
        # Without a backing file there is nothing that shows through.
        return
    try:
        # As qemu-img: what the old backing file has a place for gets one.
        rebase_layers(image, new, shared, compress=compress, detect_zeroes=False, progress=bar)
    except Exception as exc:
        if not is_expected(exc):
            raise
        doing = getattr(exc, "doing", "writing")
        if doing == "writing":
            raise CommandError(f"Error while writing to COW image: {why(exc)}") from exc
        raise CommandError(f"error while {doing}") from exc


def _change(node: Node, name: str | None, format: str | None) -> None:
    from qcow2x.cli.main import is_expected
    from qcow2x.drivers.chain import skip_filters
    from qcow2x.ops.newbacking import HeaderFull, change_backing_file

    image = skip_filters(node).image
    if image is None:
        raise _cannot_change(name, "Operation not supported")
    try:
        change_backing_file(image, name, format if name else None)
    except Exception as exc:
        if isinstance(exc, HeaderFull):
            raise _cannot_change(name, "No space left in the file header") from exc
        if not is_expected(exc):
            raise
        reason = why(exc) if isinstance(exc, OSError) else "Invalid argument"
        raise _cannot_change(name, reason) from exc
