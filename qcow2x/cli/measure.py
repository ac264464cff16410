"""``measure``: how large a file a new image needs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from qcow2x.cli.formatopts import FormatOptions, create_descriptions, join_option_lists
from qcow2x.cli.objects import read_objects
from qcow2x.cli.opening import open_disk
from qcow2x.cli.options import IMAGE_OPTS, OBJECT, OUTPUT, SHARE, Option, image_size, parse
from qcow2x.cli.options import output_format as output_style
from qcow2x.cli.report import CommandError, report
from qcow2x.cli.snapshots import Wanted
from qcow2x.cli.text import json_text

OPTIONS = (
    Option("f", "format", "FMT", "format of the source (default: look)"),
    Option("O", "output-format", "FMT", "format of the new image: raw (default), qcow2 or luks"),
    Option("o", "options", "OPTS", "how the new image is to be made, as for create"),
    Option("l", "snapshot", "SNAPSHOT", "measure this internal snapshot of the source"),
    Option("", "size", "SIZE", "measure for an empty disk of this size"),
    OUTPUT,
    SHARE,
    OBJECT,
    IMAGE_OPTS,
)
USAGE = (
    "[--output=human|json] [-O FMT] [-o OPTS] [--size N | [--object OBJECT] [--image-opts] "
    "[-f FMT] [-l SNAPSHOT] [-U] FILE]"
)
OPERANDS = (("FILE", "the source, unless --size is given"),)


def main(argv: list[str]) -> int:
    parsed = parse("measure", USAGE, OPTIONS, argv, OPERANDS)
    lists = join_option_lists(parsed.values("options"))
    snapshot = parsed.value("snapshot")
    wanted = None if snapshot is None else Wanted(snapshot)
    secrets = read_objects(parsed.values("object"))
    style = output_style(parsed)
    size = parsed.value("size")
    nbytes = None if size is None else image_size(size)
    if len(parsed.args) > 1:
        raise CommandError("At most one filename argument is allowed.")
    name = parsed.args[0] if parsed.args else None
    if name is None and (parsed.flag("image-opts") or parsed.flag("format") or wanted is not None):
        raise CommandError("--image-opts, -f, and -l require a filename argument.")
    if name is not None and nbytes is not None:
        raise CommandError("--size N cannot be used together with a filename.")
    if name is None and nbytes is None:
        raise CommandError("Either --size N or one filename must be specified.")

    from qcow2x.ops.measure import measure

    with ExitStack() as stack:
        disk: Any = None
        if name is not None:
            disk = node = stack.enter_context(
                open_disk(
                    name,
                    parsed.value("format"),
                    image_opts=parsed.flag("image-opts"),
                    secrets=secrets,
                    force_share=parsed.flag("force-share"),
                )
            )
            if wanted is not None:
                disk = stack.enter_context(wanted.open(node))
        format = parsed.value("output-format", "raw") or ""
        options = _target_options(format, lists, secrets)
        if disk is None and nbytes is None:
            nbytes = 0
        try:
            found = measure(disk, size=nbytes, dst_format=format, **options)
        except ValueError as exc:
            raise CommandError(str(exc)) from exc
    if style == "json":
        told = {} if found.bitmaps is None else {"bitmaps": found.bitmaps}
        told |= {"required": found.required, "fully-allocated": found.fully_allocated}
        print(json_text(told))
    else:
        print(f"required size: {found.required}")
        print(f"fully allocated size: {found.fully_allocated}")
        if found.bitmaps is not None:
            print(f"bitmaps size: {found.bitmaps}")
    return 0


def _target_options(format: str, lists: str, secrets: dict[str, bytes]) -> dict[str, Any]:
    """What ``measure`` has to know of the new image."""
    from qcow2x.cli.create import READ_ONLY_FORMATS, encryption_of, qcow2_arguments

    if not create_descriptions(format, None) or format == "file":
        if format in READ_ONLY_FORMATS:
            raise CommandError(f"Format driver '{format}' does not support image creation")
        raise CommandError(f"Unknown file format '{format}'")
    given = FormatOptions(create_descriptions(format))
    try:
        given.parse(lists)
    except CommandError as exc:
        report(str(exc), exc.hint)
        raise CommandError(f"Invalid options for file format '{format}'") from exc
    if format == "luks":
        return {"encryption": encryption_of("luks", given, "", secrets)}
    if format == "raw":
        return {}
    arguments = qcow2_arguments(given, secrets)
    wanted = (
        "cluster_size",
        "compat",
        "refcount_bits",
        "extended_l2",
        "preallocation",
        "backing_file",
        "encryption",
    )
    return {name: arguments[name] for name in wanted if name in arguments}
