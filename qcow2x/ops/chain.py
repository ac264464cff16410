"""The layers below an image one by one, to open some of them in another way than for reading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import qcow2x
from qcow2x import backing as _backing
from qcow2x._core.header import Header
from qcow2x.ops.disk import RawDisk
from qcow2x.storage import open_storage
from qcow2x.types import Reference

if TYPE_CHECKING:
    from qcow2x.image import Image


class Link(NamedTuple):
    """One layer of a chain that is not open."""

    source: Any
    #: ``"qcow2"`` or ``"raw"``.
    format: str
    #: How the layer above names it; None for the one on top.
    reference: Reference | None


def follow(source: Any, references: Any) -> Iterator[Link]:
    """The chain that *source* is on top of, from there down, each layer looked at when asked for.

    Raises what the policy and the headers give reason for; see :func:`qcow2x.open`.
    """
    seen = _backing.Chain()
    link = Link(source, "qcow2", None)
    while True:
        yield link
        if link.format == "raw":
            return
        storage = open_storage(link.source)
        try:
            seen.enter(storage)
            header = Header.load(storage.pread, storage.size(), storage.name)
            if header.backing_file is None:
                return
            reference = _backing.reference_to(
                "backing", header.backing_file, header.backing_format, storage.name
            )
        finally:
            if storage is not link.source:
                storage.close()
        format = _backing.check_format(reference)
        link = Link(_backing.resolve(reference, references), format, reference)


def open_stacked(
    stack: ExitStack,
    links: list[Link],
    *,
    top_mode: str,
    references: Any,
    key: Any,
    cache: str,
    lock: bool,
) -> tuple[Image, Any]:
    """Opens the first and the last of *links*, and all between: the last one for writing, on what is
    below it, the others upon it. Returns the first, and the last as a disk; *stack* closes them."""
    common: dict[str, Any] = {"references": references, "lock": lock, "cache": cache}
    if key is not None:
        # As a callable: a plain key would be refused by each layer that is not encrypted.
        common["key"] = key if callable(key) or isinstance(key, dict) else lambda name: key
    *above, last = links
    if last.format == "raw":
        bottom: Any = stack.enter_context(RawDisk(last.source, "r+", cache, lock=lock))
        storage = bottom._storage
    else:
        bottom = storage = stack.enter_context(qcow2x.open(last.source, "r+", **common))
    for number, link in reversed(list(enumerate(above))):
        mode = "r" if number else top_mode
        below = _backing.GuestDisk(storage)
        storage = stack.enter_context(qcow2x.open(link.source, mode, backing=below, **common))
    return storage, bottom
