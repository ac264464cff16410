"""What an image names: backing files, found and opened under a policy.

A name found *inside* an image is opened only if the caller's ``references`` policy allows it, and
the format of what it names is taken from the image or from the caller, never guessed: a guest that
can write its raw disk could otherwise turn it into an image that names any file of the host.
"""

from __future__ import annotations

import os

from qcow2x.errors import CorruptImage, FormatError, ReferenceDenied, UnsupportedFeature
from qcow2x.storage import FileStorage, Storage, open_storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from qcow2x.storage import Source
    from qcow2x.types import Reference

#: ``"deny"``, ``"follow"``, or a callable that gets a Reference and returns a source: a path, a
#: descriptor, a Storage, an open Image, an object with pread; or None to refuse.
ReferencePolicy: TypeAlias = "str | Callable[[Reference], Source | None]"

#: Layers of one chain. Longer ones have been seen (clouds with 1000 snapshots), endless ones too.
MAX_CHAIN_DEPTH = 1024

FORMATS = ("qcow2", "raw")


def reference_to(kind: str, name: str, fmt: str | None, referrer: str) -> Reference:
    """The Reference for ``name`` as it stands in the image ``referrer``. A backing file's relative
    name counts from the referrer's folder; a data file's, as QEMU has it, from the working one."""
    from qcow2x.types import Reference

    path = _plain_path(name, referrer if kind == "backing" else "")
    return Reference(kind, name, fmt, referrer, path)


def _plain_path(name: str, referrer: str) -> str | None:
    """``name`` as a path, relative ones against the referrer's folder; None for ``json:`` and for
    protocols such as ``nbd:``, which are no paths."""
    if name.startswith("file:"):
        name = name.removeprefix("file:")
    else:
        head = name.split("/", 1)[0]
        if ":" in head:
            return None
    return os.path.join(os.path.dirname(referrer), name)


def resolve(reference: Reference, policy: ReferencePolicy) -> Source:
    """What to open for ``reference``, or ReferenceDenied."""
    if policy == "deny":
        raise _denied(
            reference,
            'references="deny" (the default); pass references="follow", a callable, or backing=',
        )
    if policy == "follow":
        if reference.path is None:
            raise _denied(reference, "only plain paths can be followed")
        return reference.path
    if not callable(policy):
        raise ValueError(f'references must be "deny", "follow" or a callable, not {policy!r}')
    source = policy(reference)
    if source is None:
        raise _denied(reference, "the references callable refused it")
    return source


def _denied(reference: Reference, why: str) -> ReferenceDenied:
    exc = ReferenceDenied(
        f"{reference.referrer}: names the {reference.kind} file {reference.name!r}, which is not "
        f"opened: {why}"
    )
    exc.path = reference.referrer
    return exc


def check_format(reference: Reference) -> str:
    """The format to open a reference with; never a guess."""
    if reference.format is None:
        raise FormatError(
            f"{reference.referrer}: names the backing file {reference.name!r} without a format, "
            "and none is guessed; pass backing=qcow2x.open(...) for qcow2, or a Storage for raw"
        )
    if reference.format not in FORMATS:
        raise UnsupportedFeature(
            f"{reference.referrer}: its backing file {reference.name!r} has the format "
            f"{reference.format!r}; supported are {' and '.join(FORMATS)}",
            features=(f"backing format {reference.format}",),
        )
    return reference.format


class Chain:
    """The layers opened so far while a chain is followed, to refuse loops and endless ones."""

    def __init__(self) -> None:
        self._seen: list[object] = []

    def enter(self, storage: Storage) -> None:
        """Notes a layer; CorruptImage if the chain comes back to it."""
        key = _identity(storage)
        if key in self._seen:
            exc = CorruptImage(f"{storage.name}: is part of its own backing chain")
            exc.path = storage.name
            raise exc
        if len(self._seen) >= MAX_CHAIN_DEPTH:
            raise FormatError(
                f"{storage.name}: the backing chain is longer than {MAX_CHAIN_DEPTH} layers"
            )
        self._seen.append(key)


def _identity(storage: Storage) -> object:
    if isinstance(storage, FileStorage):
        status = os.fstat(storage.fileno())
        return (status.st_dev, status.st_ino)
    return id(storage)


def layer_cache(cache: str) -> str:
    """The cache mode of a backing file: only read, so only O_DIRECT or not matters."""
    return "none" if cache in ("none", "directsync") else "writeback"


class GuestDisk:
    """Given as ``backing=``: the disk below, opened by the caller in whatever format it has; the
    name and the format in the image are not looked at. None: there is no disk below, and what is
    not allocated reads as zeros."""

    def __init__(self, storage: Storage | None) -> None:
        self.storage = storage


class Withheld:
    """Stands where a backing file would be in an image opened with ``backing=False``: what would
    be read from it raises instead of pretending to be zeros."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def size(self) -> int:
        # The largest a storage may say it is, in whole sectors: no read is ever past its end.
        return (1 << 63) - 512

    def pread(self, length: int, offset: int) -> bytes:
        raise _denied(self.reference, "the image was opened with backing=False")


def open_layer_storage(source: Source, cache: str) -> Storage:
    """A backing layer's bytes, read-only."""
    return open_storage(source, cache=layer_cache(cache))
