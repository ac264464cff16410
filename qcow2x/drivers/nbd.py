"""``nbd``: a disk that an NBD server shows, by way of the system's libnbd."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from urllib.parse import parse_qs, unquote, urlsplit

from qcow2x.drivers import options as opts
from qcow2x.drivers.errors import OpenError, OptionError
from qcow2x.drivers.hooks import HookStorage
from qcow2x.drivers.libnbd import Connection
from qcow2x.drivers.node import Node
from qcow2x.drivers.options import Options
from qcow2x.errors import StorageError
from qcow2x.storage import PyStorage
from qcow2x.types import Extent

_DEFAULT_PORT = "10809"
_ALLOCATION = "base:allocation"
_ALLOCATION_DEPTH = "qemu:allocation-depth"
_HOLE, _ZERO = 1, 2
_EXPORT_NAME = ":exportname="
_TAKEN_BY_NAME = ("host", "port", "path", "export", "tls-creds", "tls-hostname")


class NbdNode(Node):
    driver = "nbd"
    fixed_size = True
    is_protocol = True
    strong = ("path", "host", "port", "export", "tls-creds", "tls-hostname", "server.")

    @classmethod
    def parse_filename(cls, filename: str, options: Options) -> None:
        for key in options:
            if key in _TAKEN_BY_NAME or key.startswith("server."):
                raise OptionError(f"Option '{key}' cannot be used with a file name")
        if "://" in filename:
            _parse_uri(filename, options)
            return
        place, given, export = filename.partition(_EXPORT_NAME)
        if given and export:
            options["export"] = export
        if not place.startswith("nbd:"):
            raise OptionError("File name string for NBD must start with 'nbd:'")
        place = place.removeprefix("nbd:")
        if place.startswith("unix:"):
            options["server.type"] = "unix"
            options["server.path"] = place.removeprefix("unix:")
        elif place:
            host, _, port = place.rpartition(":")
            if not host or not port:
                raise OptionError(f"error parsing address '{place}'")
            options["server.type"] = "inet"
            options["server.host"] = host.removeprefix("[").removesuffix("]")
            options["server.port"] = port

    def open(self, options: Options) -> None:
        self._address = _take_address(options)
        self._export = opts.take_text(options, "export")
        bitmap = opts.take_text(options, "x-dirty-bitmap")
        opts.take_number(options, "reconnect-delay")
        patience = opts.take_number(options, "open-timeout") or 0
        if opts.take_text(options, "tls-creds") or opts.take_text(options, "tls-hostname"):
            raise OptionError("TLS is not supported")
        self._context = bitmap or _ALLOCATION
        self._exact = bitmap is not None
        self._server = server = self._connect(time.monotonic() + patience)
        if bitmap is not None and bitmap not in server.contexts:
            raise OptionError(f"requested x-dirty-bitmap {bitmap} not found")
        if self.writable and server.read_only:
            if not self.graph.auto_read_only(self.options):
                raise OpenError(
                    "request on write denied without write permission",
                    OSError(errno.EACCES, os.strerror(errno.EACCES)),
                )
            self.writable = False
        self.storage = PyStorage(HookStorage(self), self.writable)

    def _connect(self, deadline: float) -> Connection:
        while True:
            try:
                return Connection(
                    self.exact_filename, self._address, self._export or "", [self._context]
                )
            except StorageError as exc:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                if exc.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.EACCES):
                    raise OpenError(
                        f"Failed to connect to '{':'.join(self._address)}'", exc
                    ) from exc
                raise

    def own_filename(self) -> str | None:
        export = "" if self._export is None else self._export
        if len(self._address) == 1:
            slash = "/" if self._export is not None else ""
            return f"nbd+unix://{slash}{export}?socket={self._address[0]}"
        slash = "/" if self._export is not None else ""
        return f"nbd://{':'.join(self._address)}{slash}{export}"

    # ---- The disk ----

    def _size(self) -> int:
        return self._server.size

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        size = self._server.size
        while offset < end:
            if offset >= size:
                yield Extent(offset, end - offset, False, True, False, 0, None, None)
                return
            nbytes, flags = min(end, size) - offset, 0
            if self._context in self._server.contexts:
                nbytes, flags = self._server.status(offset, nbytes, self._context)
            yield self._run(offset, nbytes, flags)
            offset += nbytes

    def _run(self, offset: int, nbytes: int, flags: int) -> Extent:
        if self._context == _ALLOCATION_DEPTH:
            flags = min(flags, 2)
        data, zero = not flags & _HOLE, bool(flags & _ZERO)
        if not data and not zero:
            if self._exact:
                # The flags of another context, asked for as if they were these.
                return Extent(offset, nbytes, False, False, False, 0, None, None)
            # Nothing is stored, but what would be read nobody says: it has to be read.
            data = True
        return Extent(offset, nbytes, data, zero, False, 0, offset, self.filename)

    def _read(self, view: memoryview, offset: int) -> None:
        inside = max(0, min(len(view), self._server.size - offset))
        if inside:
            self._server.read(view[:inside], offset)
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)

    def _write(self, view: memoryview, offset: int, fua: bool) -> None:
        self._server.write(bytes(view), offset, fua)

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        if self._server.can_zero:
            self._server.zero(offset, length, unmap)
        else:
            for at in range(offset, offset + length, 1 << 20):
                self._server.write(bytes(min(1 << 20, offset + length - at)), at, False)
        if fua:
            self._server.flush()

    def _discard(self, offset: int, length: int) -> None:
        if self._server.can_trim:
            self._server.trim(offset, length)

    def _flush(self) -> None:
        self._server.flush()

    def _resize(self, size: int, shrink: bool, preallocation: str) -> None:
        if size != self._server.size:
            raise OSError(errno.ENOTSUP, "Cannot resize NBD nodes")

    def _close(self) -> None:
        self._server.close()


def _parse_uri(uri: str, options: Options) -> None:
    """``nbd://host:port/export`` or ``nbd+unix:///export?socket=path``."""
    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError:
        raise OptionError("No valid URL specified") from None
    query = parse_qs(parts.query, keep_blank_values=True)
    if parts.scheme not in ("nbd", "nbd+tcp", "nbd+unix"):
        raise OptionError("No valid URL specified")
    if path := unquote(parts.path.removeprefix("/")):
        options["export"] = path
    if parts.scheme == "nbd+unix":
        if parts.netloc or set(query) != {"socket"}:
            raise OptionError("No valid URL specified")
        options["server.type"] = "unix"
        options["server.path"] = query["socket"][0]
        return
    if not parts.hostname or query:
        raise OptionError("No valid URL specified")
    options["server.type"] = "inet"
    options["server.host"] = parts.hostname
    options["server.port"] = str(port) if port else _DEFAULT_PORT


def _take_address(options: Options) -> tuple[str, ...]:
    """Where the server is, from ``server.*`` or the older ``path``, ``host`` and ``port``."""
    path, host, port = (opts.take_text(options, key) for key in ("path", "host", "port"))
    server = opts.take_below(options, "server")
    if path or host or port:
        if server:
            raise OptionError("Cannot use 'server' and path/host/port at the same time")
        if path and host:
            raise OptionError("path and host may not be used at the same time")
        if port and not host:
            raise OptionError("port may not be used without host")
        return (path,) if path else (str(host), port or _DEFAULT_PORT)
    if not server:
        raise OptionError("NBD server address missing")
    kind = opts.take_text(server, "type")
    wanted = {"unix": ("path",), "inet": ("host", "port")}.get(kind or "")
    if kind is None:
        raise OptionError("Parameter 'server.type' is missing")
    if wanted is None:
        raise OptionError(f"Parameter 'server.type' does not accept value '{kind}'")
    found = []
    for key in wanted:
        value = opts.take_text(server, key)
        if value is None:
            raise OptionError(f"Parameter 'server.{key}' is missing")
        found.append(value)
    if server:
        raise OptionError(f"Parameter 'server.{next(iter(server))}' is unexpected")
    return tuple(found)
