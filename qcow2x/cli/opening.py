"""Opening what a command line names: a file name, ``json:{...}``, or options of a driver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcow2x.cli.report import CommandError

if TYPE_CHECKING:
    from qcow2x.drivers import Node


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
    from qcow2x.cli.main import is_expected
    from qcow2x.cli.words import hint, reason
    from qcow2x.drivers import open_node

    if image_opts and format is not None:
        raise CommandError("--image-opts and --format are mutually exclusive")
    try:
        return open_node(name, format=format, image_opts=image_opts, secrets=secrets, **options)
    except Exception as exc:
        if not is_expected(exc):
            raise
        raise CommandError(
            f"Could not open '{name}': {reason(exc)}", hint=hint(exc).lstrip("\n")
        ) from exc
