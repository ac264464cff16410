"""Opening what a command line names: a file name, ``json:{...}``, or options of a driver."""

from __future__ import annotations

import sys

from qcow2x.cli.report import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from qcow2x.drivers import Node
    from qcow2x.image import Image

#: What a guest writes into a raw disk could make it look like another format the next time.
_GUESSED_RAW = """\
WARNING: Image format was not specified for '{}' and probing guessed raw.
         Automatically detecting the format is dangerous for raw images, write operations on block \
0 will be restricted.
         Specify the 'raw' format explicitly to remove the restrictions."""


def open_disk(
    name: str,
    format: str | None = None,
    *,
    image_opts: bool = False,
    secrets: Mapping[str, bytes] | None = None,
    **options: Any,
) -> Node:
    """The node for ``name``, as :func:`qcow2x.drivers.open_node` opens it (``options`` are its).

    Raises CommandError with what qemu-img says of a disk that cannot be opened.
    """
    from qcow2x.drivers import open_node

    if image_opts and format is not None:
        raise CommandError("--image-opts and --format are mutually exclusive")
    try:
        node = open_node(name, format=format, image_opts=image_opts, secrets=secrets, **options)
    except Exception as exc:
        raise failure(exc, f"Could not open '{name}'") from exc
    tell_rebuilt(node.image)
    if node.driver == "raw" and node.probed and node.writable:
        print(_GUESSED_RAW.format(node.children["file"].filename), file=sys.stderr)
    return node


def tell_rebuilt(image: Image | None) -> None:
    """Tells what was repaired because the last writer of an image did not get to close it."""
    if image is None or image.rebuilt is None:
        return
    from qcow2x.cli.checktext import repair_lines

    for line in repair_lines(image.rebuilt, "all"):
        print(line, file=sys.stderr)


def stored_in(node: Node) -> str:
    """The name of the file at the bottom, with which messages of the library begin."""
    while node.file is not None:
        node = node.file
    return node.storage.name


def failure(exc: Exception, doing: str = "", name: str = "") -> CommandError:
    """What a command ends with when ``exc`` came up, behind what it was doing. Of an error that
    begins with the ``name`` of the image only the rest is told. An exception that tells of a bug is
    raised as it is."""
    from qcow2x.cli.main import is_expected
    from qcow2x.cli.words import hint, reason

    front = f"{doing}: " if doing else ""
    if isinstance(exc, CommandError):
        return CommandError(f"{front}{exc}", hint=exc.hint, status=exc.status)
    if not is_expected(exc):
        raise exc
    text = reason(exc).removeprefix(f"{name}: ")
    return CommandError(front + text, hint=hint(exc).lstrip("\n"))
