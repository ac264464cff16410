"""The undo journal of a repair: the old bytes of everything that it changes.

The file is written and synced whole before the image is touched. All integers are big-endian::

    16 bytes    magic
    u64 u64     size of the image before and after the repair
    104 bytes   the image's header as it was
    records     u64 offset, u32 length, u32 CRC-32 of the new bytes, then the old bytes
    u64 u32 u32 end: offset 2^64 - 1, length 0, CRC-32 of everything before this record
    "DONE"      appended when the repair is complete
    "UNDO"      appended before the first byte is put back
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from typing import IO

from qcow2x.errors import CorruptImage, FormatError
from qcow2x.locking import lock_image
from qcow2x.ops.overlay import Overlay
from qcow2x.storage import Source, Storage, open_storage

MAGIC = b"qcow2x undo 1\r\n\0"
DONE, UNDO = b"DONE", b"UNDO"
_FRONT = struct.Struct(">16sQQ104s")
_RECORD = struct.Struct(">QII")
_END = (1 << 64) - 1
_MAX_RECORD = 1 << 20

#: What a repair never changes: magic and version, cluster size, disk size; refcount width.
_SAME = (slice(0, 8), slice(20, 32), slice(96, 100))


def default_journal(path: str | os.PathLike[str]) -> str:
    """A name beside the image that is not taken: ``IMAGE.qcow2x-undo``, else with a number."""
    name = base = os.fspath(path) + ".qcow2x-undo"
    number = 1
    while os.path.lexists(name):
        name = f"{base}.{number}"
        number += 1
    return name


class Journal:
    """A journal being written. Raises FileExistsError rather than overwrite one."""

    def __init__(self, path: str | os.PathLike[str], overlay: Overlay) -> None:
        self.path = os.fspath(path)
        self._file = open(self.path, "xb")
        try:
            self._save(overlay)
        except BaseException:
            self._file.close()
            os.unlink(self.path)
            raise

    def _save(self, overlay: Overlay) -> None:
        crc = 0
        header = overlay.original_header()
        crc = self._put(_FRONT.pack(MAGIC, overlay.old_size, overlay.size(), header), crc)
        for offset, old, new in overlay.changes():
            crc = self._put(_RECORD.pack(offset, len(old), zlib.crc32(new)) + old, crc)
        self._file.write(_RECORD.pack(_END, 0, crc))
        self._sync()
        folder = os.open(os.path.dirname(os.path.abspath(self.path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _put(self, data: bytes, crc: int) -> int:
        self._file.write(data)
        return zlib.crc32(data, crc)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def complete(self) -> None:
        """The repair is durable: from now on the journal fits one state of the image only."""
        self._file.write(DONE)
        self._sync()

    def close(self) -> None:
        self._file.close()


def undo_repair(
    source: Source,
    journal: str | os.PathLike[str],
    *,
    force: bool = False,
    lock: bool = True,
) -> bool:
    """Puts back every byte that the repair with this journal has changed, and the file's length.

    Works after a complete repair, after one that was cut short anywhere, and after an undo that
    was. False where there is nothing to put back: the journal was never finished, so that the
    repair never began. Durable at return; the journal stays.

    Raises FormatError for what is no journal, CorruptImage where the image is not the one that
    was repaired or has been changed since (``force=True`` overrides the latter), ImageLocked,
    OSError. Nothing else may use the image meanwhile.
    """
    with open(journal, "r+b") as file:
        layout = _Reader(file, os.fspath(journal))
        if not layout.finished:
            return False
        storage = open_storage(source, writable=True)
        held = lock_image(storage, True) if lock else None
        try:
            _check_identity(storage, layout)
            if layout.state == DONE and not force:
                _check_unchanged(storage, layout)
            file.seek(0, os.SEEK_END)
            file.write(UNDO)
            file.flush()
            os.fsync(file.fileno())
            for offset, old, _ in layout.records():
                storage.pwrite(old, offset)
            # Synced first: a file cut short may not be the state that a crash leaves behind.
            storage.flush()
            if storage.size() != layout.old_size:
                storage.truncate(layout.old_size)
                storage.flush()
        finally:
            if held is not None:
                held.release()
            if storage is not source:
                storage.close()
    return True


class _Reader:
    """A journal, read and found whole, or found unfinished."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self.name = name
        front = file.read(_FRONT.size)
        if front[:16] != MAGIC[: len(front)]:
            raise FormatError(f"{name}: is no undo journal of qcow2x")
        self.finished = False
        self.state = b""
        if len(front) < _FRONT.size:
            return
        _, self.old_size, self.new_size, self.header = _FRONT.unpack(front)
        crc = zlib.crc32(front)
        while True:
            head = file.read(_RECORD.size)
            if len(head) < _RECORD.size:
                return
            offset, length, new_crc = _RECORD.unpack(head)
            if offset == _END:
                break
            if length > _MAX_RECORD:
                raise FormatError(f"{name}: the undo journal is damaged")
            old = file.read(length)
            if len(old) < length:
                return
            crc = zlib.crc32(old, zlib.crc32(head, crc))
        if crc != new_crc:
            raise FormatError(f"{name}: the undo journal is damaged")
        self.finished = True
        marks = file.read()
        self.state = UNDO if UNDO in marks else DONE if marks.startswith(DONE) else b""

    def records(self) -> Iterator[tuple[int, bytes, int]]:
        """``(offset, old bytes, CRC-32 of the new ones)``."""
        at = _FRONT.size
        while True:
            self._file.seek(at)
            offset, length, new_crc = _RECORD.unpack(self._file.read(_RECORD.size))
            if offset == _END:
                return
            yield offset, self._file.read(length), new_crc
            at += _RECORD.size + length


def _check_identity(storage: Storage, layout: _Reader) -> None:
    header = storage.pread(len(layout.header), 0).ljust(len(layout.header), b"\0")
    if any(header[part] != layout.header[part] for part in _SAME):
        raise _refusal(storage, f"is not the image that {layout.name} belongs to")


def _check_unchanged(storage: Storage, layout: _Reader) -> None:
    same = storage.size() == max(layout.new_size, layout.old_size) and all(
        zlib.crc32(storage.pread(len(old), offset)) == new_crc
        for offset, old, new_crc in layout.records()
    )
    if not same:
        raise _refusal(
            storage,
            "has been written to since it was repaired; putting the old tables back would lose "
            "that (force overrides)",
        )


def _refusal(storage: Storage, what: str) -> CorruptImage:
    exc = CorruptImage(f"{storage.name}: {what}")
    exc.path = storage.name
    return exc
