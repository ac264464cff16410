"""What an untrusted image says of itself, told without opening anything that it names.

    report = qcow2x.inspect("upload.qcow2", max_virtual_size=100 << 30)
    if report.verdict != "ok":
        raise Refused(report.reasons)

At most 1 MiB is read, whatever the file says, and an invalid image gives an answer rather than an
exception. The verdict is about the file as it is now: whoever opens it later should open the same
descriptor, or a copy that nobody else can write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from qcow2x.storage import Source

__all__ = [
    "READ_LIMIT",
    "Anomaly",
    "Inspection",
    "Inspector",
    "NamedFile",
    "Window",
    "inspect",
]

#: Bytes that one inspection reads, at most.
READ_LIMIT = 1 << 20

_SEVERITIES = ("note", "caution", "reject")
_VERDICTS = ("ok", "caution", "reject")


class Stream(Protocol):
    """What can be read from front to back only: a pipe, a socket's file, an HTTP response."""

    def read(self, length: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A file that an image names. Nothing opens it here."""

    #: ``"backing"`` or ``"data-file"``.
    kind: str
    #: The name as it stands in the image; undecodable bytes as surrogates (``os.fsencode`` gives
    #: them back). Empty where the image needs a file and gives no name, or the name was not seen.
    name: str
    #: The format that the image gives for it, or None where it gives none.
    format: str | None
    #: What is remarkable about the name: ``"json"`` (a ``json:`` description of block devices),
    #: ``"protocol"`` (``nbd://``, ``file:``, ``ssh:`` ...), ``"absolute"``, ``"parent"`` (has a
    #: ``..``), ``"device"`` (lies in ``/dev``, ``/proc`` or ``/sys``), ``"unprintable"``,
    #: ``"empty"``, ``"unseen"`` (its place lies beyond what was read).
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Anomaly:
    """One thing worth knowing about an image."""

    #: A stable word for programs: ``"reserved-bits"``, ``"tables-overlap"``, ``"limit-l1-table"`` ...
    code: str
    #: ``"note"`` (legal and harmless), ``"caution"`` (legal but unusual, or risky in wrong hands) or
    #: ``"reject"`` (broken, hostile, or against the policy).
    severity: str
    #: The sentence for people. Names out of the image are quoted and escaped.
    message: str
    #: Byte of the file where it stands, or None.
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Inspection:
    """The answer of :func:`inspect`. Sizes are bytes; None where the image does not say."""

    #: ``"qcow2"``, the name of another well-known format (``qcow1 vmdk vhd vhdx vdi qed luks iso9660
    #: gpt mbr ...``), or ``"unknown"``, which is all that can be said of a raw disk.
    format: str
    #: The header keeps to the specification and to QEMU's limits.
    valid: bool
    #: ``"ok"``, ``"caution"`` or ``"reject"``.
    verdict: str
    #: Why the verdict is not ``"ok"``, the worst first.
    reasons: tuple[str, ...]
    anomalies: tuple[Anomaly, ...] = ()
    references: tuple[NamedFile, ...] = ()
    #: Size of the file, None for a stream that was not read to its end.
    file_size: int | None = None
    #: Bytes that were looked at.
    bytes_read: int = 0
    version: int | None = None
    virtual_size: int | None = None
    cluster_size: int | None = None
    refcount_bits: int | None = None
    #: ``"zlib"`` or ``"zstd"``.
    compression_type: str | None = None
    #: ``"aes"``, ``"luks"`` or None.
    encryption: str | None = None
    #: Names of the features by kind; those the specification does not know as
    #: ``unknown bit 9``, followed by the image's own name for it.
    incompatible_features: tuple[str, ...] = ()
    compatible_features: tuple[str, ...] = ()
    autoclear_features: tuple[str, ...] = ()
    snapshot_count: int = 0
    bitmap_count: int = 0
    #: Names of those bitmaps whose directory entries were read.
    bitmaps: tuple[str, ...] = ()
    #: Formats, besides ``format``, for which other tools may take the file.
    also_looks_like: tuple[str, ...] = ()

    @property
    def limits_exceeded(self) -> tuple[Anomaly, ...]:
        """Those anomalies that are a number beyond what QEMU, or the caller, allows."""
        return tuple(item for item in self.anomalies if item.code.startswith("limit-"))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, tuples and scalars, for JSON or a log."""
        return dataclasses.asdict(self)


def inspect(
    source: Source | Buffer | Stream,
    *,
    max_virtual_size: int | None = None,
    allow_references: bool = False,
) -> Inspection:
    """What an untrusted image says of itself, with a verdict that a service can act on.

    ``source`` is a path, a file descriptor, a Storage, an object with ``size()`` and
    ``pread(length, offset)``, a buffer that *holds* the image (``bytes``, a memoryview, an mmap:
    unlike :func:`qcow2x.open`, bytes are never taken for a path), or a stream: an object with
    ``read(length)``, of which up to 1 MiB is consumed from where it stands.

    At most 1 MiB is read in all and nothing but ``source`` is opened; no lock is taken, so the
    image may be in use. Metadata that lies outside the first MiB of a stream is not looked at; of
    the mapping tables only the first entries are, here or there.

    ``max_virtual_size`` in bytes is the largest disk, or snapshot of it, that is welcome.
    ``allow_references`` lets images pass that name a backing or data file by a plain path;
    absolute paths and ``..`` are then a caution, and protocols, ``json:`` names and devices are
    refused all the same.

    Only a source that cannot be opened or read raises (OSError, TypeError, ValueError); an image
    that is no image does not. Any number of threads may inspect one source at once, a stream apart.
    """
    buffer = _buffer_of(source)
    if buffer is not None:
        window = Window(lambda length, at: bytes(buffer[at : at + length]), buffer.nbytes)
        return _examine(window, max_virtual_size, allow_references)
    if _is_stream(source):
        return _inspect_stream(cast(Stream, source), max_virtual_size, allow_references)

    from qcow2x.storage import open_storage

    storage = open_storage(cast("Source", source))
    try:
        # An open image is a storage too; there size is a number.
        size = storage.size if isinstance(storage.size, int) else storage.size()
        return _examine(Window(storage.pread, size), max_virtual_size, allow_references)
    finally:
        if storage is not source:
            storage.close()


class Inspector:
    """The same for bytes that are pushed in, as an upload arrives; not for several threads at once.

        inspector = Inspector(max_virtual_size=100 << 30)
        for chunk in upload:
            if not inspector.feed(chunk) and inspector.result().verdict == "reject":
                break

    Keeps the first MiB in memory and counts the rest.
    """

    def __init__(
        self, *, max_virtual_size: int | None = None, allow_references: bool = False
    ) -> None:
        self._max_virtual_size = max_virtual_size
        self._allow_references = allow_references
        self._seen = bytearray()
        self._tail = b""
        self._fed = 0

    def feed(self, chunk: Buffer) -> bool:
        """Takes the next bytes of the image, any number of them; whether still more would add to the
        answer. Go on feeding after False if :meth:`result` is to know the file's size."""
        view = memoryview(chunk).cast("B")
        self._fed += view.nbytes
        room = READ_LIMIT - len(self._seen)
        if room:
            self._seen += view[:room]
        self._tail = (self._tail + bytes(view[-512:]))[-512:]
        return len(self._seen) < READ_LIMIT

    def result(self, *, complete: bool = False) -> Inspection:
        """The answer for the bytes so far. ``complete`` says that they are the whole image, so that
        tables beyond its end are found out. May be asked at any time and more than once; until the
        header cluster has arrived the verdict is ``"reject"``."""
        size = self._fed if complete else None
        return _examine(
            Window(self._pread, size, len(self._seen)),
            self._max_virtual_size,
            self._allow_references,
        )

    def _pread(self, length: int, offset: int) -> bytes:
        start = self._fed - len(self._tail)
        if offset >= len(self._seen) and offset >= start:
            return self._tail[offset - start :][:length]
        return bytes(self._seen[offset : offset + length])


class Window:
    """The part of a file that an inspection may see: READ_LIMIT bytes, wherever they are taken."""

    def __init__(
        self,
        pread: Callable[[int, int], bytes],
        file_size: int | None,
        seen: int | None = None,
    ) -> None:
        self._pread = pread
        #: Bytes of the whole file, None if unknown.
        self.file_size = file_size
        #: For a stream, how many bytes of its start are there; None if any place can be read.
        self.seen = seen
        self.bytes_read = 0

    def read(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer at the end of the file, of a stream or of what is allowed."""
        end = self.file_size if self.file_size is not None else self.seen or 0
        length = min(length, end - offset, READ_LIMIT - self.bytes_read)
        if offset < 0 or length <= 0:
            return b""
        data = bytes(self._pread(length, offset))[:length]
        self.bytes_read += len(data)
        return data


def verdict_of(anomalies: list[Anomaly]) -> tuple[str, tuple[str, ...]]:
    """The verdict and its reasons."""
    grave = [item for item in anomalies if item.severity != "note"]
    grave.sort(key=lambda item: -_SEVERITIES.index(item.severity))
    worst = _SEVERITIES.index(grave[0].severity) if grave else 0
    return _VERDICTS[worst], tuple(item.message for item in grave)


def _examine(window: Window, max_virtual_size: int | None, allow_references: bool) -> Inspection:
    from qcow2x._examination import examine

    return examine(window, max_virtual_size, allow_references)


def _buffer_of(source: object) -> memoryview | None:
    try:
        return memoryview(source).cast("B")  # type: ignore[arg-type]
    except TypeError:
        return None


def _is_stream(source: object) -> bool:
    return callable(getattr(source, "read", None)) and not callable(getattr(source, "pread", None))


def _inspect_stream(
    stream: Stream, max_virtual_size: int | None, allow_references: bool
) -> Inspection:
    inspector = Inspector(max_virtual_size=max_virtual_size, allow_references=allow_references)
    wanted = READ_LIMIT
    while wanted:
        chunk = stream.read(wanted)
        if chunk is None:
            raise BlockingIOError("the stream has no bytes ready; inspect needs a blocking one")
        if isinstance(chunk, str):
            raise TypeError("the stream gives text; open it in binary mode")
        if not chunk:
            return inspector.result(complete=True)
        inspector.feed(chunk)
        wanted = max(0, wanted - len(chunk))
    return inspector.result()
