"""The system's libnbd, by ctypes: the NBD protocol is its business.

Only what the driver needs. Any thread may use a connection; libnbd lets one request in at a time.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
from functools import cache
from typing import Any

from qcow2x.drivers.errors import OptionError
from qcow2x.errors import StorageError

FUA, NO_HOLE, REQ_ONE = 1, 2, 8
#: The most that one request may carry, where the server does not say otherwise.
_MAX_PAYLOAD = 32 << 20
#: Lengths without payload are 32-bit numbers in the protocol.
_MAX_LENGTH = 1 << 30

_EXTENT = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_int),
)


class _ExtentCallback(ctypes.Structure):
    _fields_ = [
        ("callback", _EXTENT),
        ("user_data", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
    ]


@cache
def _library() -> Any:
    """Raises OptionError where libnbd is not installed."""
    try:
        lib = ctypes.CDLL(ctypes.util.find_library("nbd") or "libnbd.so.0")
    except OSError:
        raise OptionError(
            "the nbd driver needs the library libnbd (Debian: libnbd0, Fedora: libnbd)"
        ) from None
    handle, text = ctypes.c_void_p, ctypes.c_char_p
    number, flags, buffer = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
    for name, result, arguments in (
        ("nbd_create", handle, []),
        ("nbd_close", None, [handle]),
        ("nbd_get_error", text, []),
        ("nbd_get_errno", ctypes.c_int, []),
        ("nbd_set_export_name", ctypes.c_int, [handle, text]),
        ("nbd_add_meta_context", ctypes.c_int, [handle, text]),
        ("nbd_connect_unix", ctypes.c_int, [handle, text]),
        ("nbd_connect_tcp", ctypes.c_int, [handle, text, text]),
        ("nbd_shutdown", ctypes.c_int, [handle, flags]),
        ("nbd_get_size", ctypes.c_int64, [handle]),
        ("nbd_get_block_size", ctypes.c_int64, [handle, ctypes.c_int]),
        ("nbd_is_read_only", ctypes.c_int, [handle]),
        ("nbd_can_meta_context", ctypes.c_int, [handle, text]),
        ("nbd_can_zero", ctypes.c_int, [handle]),
        ("nbd_can_trim", ctypes.c_int, [handle]),
        ("nbd_can_flush", ctypes.c_int, [handle]),
        ("nbd_can_fua", ctypes.c_int, [handle]),
        ("nbd_pread", ctypes.c_int, [handle, buffer, ctypes.c_size_t, number, flags]),
        ("nbd_pwrite", ctypes.c_int, [handle, buffer, ctypes.c_size_t, number, flags]),
        ("nbd_zero", ctypes.c_int, [handle, number, number, flags]),
        ("nbd_trim", ctypes.c_int, [handle, number, number, flags]),
        ("nbd_flush", ctypes.c_int, [handle, flags]),
        ("nbd_block_status", ctypes.c_int, [handle, number, number, _ExtentCallback, flags]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Connection:
    """An export of a server. Offsets and lengths are bytes; errors are StorageError."""

    def __init__(
        self, name: str, address: tuple[str, ...], export: str, contexts: list[str]
    ) -> None:
        """``address`` is ``(path,)`` of a Unix socket or ``(host, port)``."""
        self.name = name
        self._lib = _library()
        self._handle = self._lib.nbd_create()
        if not self._handle:
            raise self._error("cannot make a handle")
        try:
            self._ask("set_export_name", os.fsencode(export))
            for context in contexts:
                self._ask("add_meta_context", context.encode())
            encoded = [os.fsencode(part) for part in address]
            self._ask("connect_unix" if len(encoded) == 1 else "connect_tcp", *encoded)
            self.size: int = self._ask("get_size")
            self.read_only = bool(self._ask("is_read_only"))
            self.can_zero = bool(self._ask("can_zero"))
            self.can_trim = bool(self._ask("can_trim"))
            self._can_flush = bool(self._ask("can_flush"))
            self._can_fua = bool(self._ask("can_fua"))
            largest = self._ask("get_block_size", 2)
            self._payload: int = min(largest, _MAX_PAYLOAD) if largest else _MAX_PAYLOAD
            self.contexts = [
                context for context in contexts if self._ask("can_meta_context", context.encode())
            ]
        except BaseException:
            self.close()
            raise

    def _ask(self, function: str, *arguments: Any) -> int:
        if not self._handle:
            raise ValueError(f"{self.name}: the connection is closed")
        answer: int = getattr(self._lib, f"nbd_{function}")(self._handle, *arguments)
        if answer < 0:
            raise self._error(function)
        return answer

    def _error(self, doing: str) -> StorageError:
        number = self._lib.nbd_get_errno() or errno.EIO
        said = os.fsdecode(self._lib.nbd_get_error() or doing.encode())
        exc = StorageError(number, f"{self.name}: {said}")
        exc.path = self.name
        return exc

    def read(self, view: memoryview, offset: int) -> None:
        # ctypes wants a writable buffer; ours are, or they could not be filled.
        for at in range(0, len(view), self._payload):
            piece = view[at : at + self._payload]
            memory = (ctypes.c_char * len(piece)).from_buffer(piece)
            self._ask("pread", ctypes.addressof(memory), len(piece), offset + at, 0)

    def write(self, data: bytes, offset: int, fua: bool) -> None:
        flags = FUA if fua and self._can_fua else 0
        for at in range(0, len(data), self._payload):
            piece = data[at : at + self._payload]
            self._ask("pwrite", piece, len(piece), offset + at, flags)
        if fua and not self._can_fua:
            self.flush()

    def zero(self, offset: int, length: int, may_unmap: bool) -> None:
        for at in range(offset, offset + length, _MAX_LENGTH):
            nbytes = min(_MAX_LENGTH, offset + length - at)
            self._ask("zero", nbytes, at, 0 if may_unmap else NO_HOLE)

    def trim(self, offset: int, length: int) -> None:
        for at in range(offset, offset + length, _MAX_LENGTH):
            self._ask("trim", min(_MAX_LENGTH, offset + length - at), at, 0)

    def flush(self) -> None:
        if self._can_flush:
            self._ask("flush", 0)

    def status(self, offset: int, length: int, context: str) -> tuple[int, int]:
        """The run at ``offset``: how long it is, at most ``length``, and its flags in ``context``,
        one of :attr:`contexts`."""
        runs: list[tuple[int, int]] = []

        def note(user: Any, name: bytes, start: int, entries: Any, count: int, failure: Any) -> int:
            if name == context.encode() and count >= 2:
                runs.append((entries[0], entries[1]))
            return 0

        callback = _EXTENT(note)
        self._ask(
            "block_status",
            min(length, _MAX_LENGTH),
            offset,
            _ExtentCallback(callback, None, None),
            REQ_ONE,
        )
        if not runs or not runs[0][0]:
            raise StorageError(errno.EIO, f"{self.name}: the server told no block status")
        return min(runs[0][0], length), runs[0][1]

    def close(self) -> None:
        """Says goodbye, where the server still listens."""
        handle, self._handle = self._handle, None
        if handle:
            self._lib.nbd_shutdown(handle, 0)
            self._lib.nbd_close(handle)
