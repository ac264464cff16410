"""Node: one block driver at work, in the graph that a file name or a set of options stands for."""

from __future__ import annotations

import errno
import os

from qcow2x.drivers import naming
from qcow2x.drivers.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager
    from threading import RLock
    from types import TracebackType
    from typing import Any, ClassVar

    from typing_extensions import Self

    from qcow2x.drivers.blkdebug_rules import Rules
    from qcow2x.drivers.opening import Graph
    from qcow2x.drivers.options import Options
    from qcow2x.image import Image
    from qcow2x.storage import Storage
    from qcow2x.types import Extent

SECTOR = 512


class Node:
    """An open block driver, and a disk: ``size``, ``extents``, ``pread``, ``pwrite`` and so on.

    Made by :func:`qcow2x.drivers.open_node`; a context manager. Offsets and lengths are bytes of
    the disk that the node shows. Any thread may use it, several at once. Reads past the end are
    short; writes past it raise OSError (EIO), as QEMU has it, and writes to a node that is open
    read-only PermissionError.

    A driver is a subclass: it sets ``driver`` and the class variables below, takes its options in
    :meth:`open`, and gives its parent a :class:`qcow2x.storage.Storage` in ``storage``. Whatever it
    does not override works on that storage.
    """

    #: The driver's name.
    driver: ClassVar[str]
    #: It shows what a protocol or a file holds, in a format: may have the children file, backing.
    is_format: ClassVar[bool] = False
    is_filter: ClassVar[bool] = False
    #: It is at the bottom: file names are its own matter.
    is_protocol: ClassVar[bool] = False
    needs_filename: ClassVar[bool] = False
    #: It cannot grow: an image in it has to do with the room that there is.
    fixed_size: bool = False
    supports_backing: ClassVar[bool] = False
    #: Options that make a difference to what the disk holds; one that ends in a dot stands for all
    #: that start so. Where one is given the plain file name does not lead here.
    strong: ClassVar[tuple[str, ...]] = ()
    #: The child whose name is this node's, where there is nothing else to say.
    primary: ClassVar[str] = "file"

    storage: Storage
    #: The qcow2 image, where the driver is qcow2 and it was opened for more than looking.
    image: Image | None = None

    def __init__(self, graph: Graph, options: Options, filename: str | None) -> None:
        self.graph = graph
        #: Every option in force, flat, without those of children.
        self.options = options
        self.children: dict[str, Node] = {}
        self.writable = False
        self.copy_on_read = False
        self.unmap = False
        self.detect_zeroes = "off"
        self.node_name: str | None = None
        #: Whether the format was guessed from the first bytes.
        self.probed = False
        #: ``backing: null`` was given: what is not allocated reads as zeros, whatever the image says.
        self.no_backing = False
        #: What the image says of its backing file.
        self.backing_file = ""
        self.backing_format: str | None = None
        #: The backing node is the image's own choice, without any option of its own.
        self.implicit_backing = False
        #: The backing file's name as the image has it; as its node is called, once that is open.
        self.auto_backing = ""
        self._opened_as = filename
        self._closed = False

    @property
    def writing(self) -> RLock:
        """Held by who reads something to write it back changed, and by writers he must not undo."""
        lock: RLock | None = self.__dict__.get("_writing")
        if lock is None:
            from threading import RLock

            # One thread's lock is kept, whoever comes first.
            lock = self.__dict__.setdefault("_writing", RLock())
        return lock

    # ---- For a driver to override ----

    @classmethod
    def parse_filename(cls, filename: str, options: Options) -> None:
        """Turns a name with this driver's protocol in front into options."""

    def open(self, options: Options) -> None:
        """Takes the driver's own options out of ``options`` and opens what they name."""
        raise NotImplementedError

    def complete(self, backing: Node | None) -> None:
        """The backing node is open now, if there is to be one."""

    def own_filename(self) -> str | None:
        """A plain name that leads back to this node; empty where there is none. None: the child's
        name will do, if nothing else was said."""
        return None

    def gather_children(self, options: dict[str, Any], backing_overridden: bool) -> None:
        """Adds the children's options to this node's, for a ``json:`` name."""
        for name, child in self.children.items():
            if name != "backing" or backing_overridden:
                options[name] = child.full_options
        if backing_overridden and "backing" not in self.children:
            options["backing"] = None

    def join_options(self, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
        """The options to open this node with again, where ``old`` were given before and ``new``
        change some of them. Both flat."""
        return {**old, **new}

    # ---- What it is called ----

    @property
    def filename(self) -> str:
        """The name as QEMU prints it: the plain one where the graph can be rebuilt from it, else
        ``json:{...}`` with all that matters."""
        return self.exact_filename or naming.json_name(self.full_options)

    @property
    def name(self) -> str:
        return self.filename

    @property
    def format(self) -> str:
        return self.driver

    @property
    def exact_filename(self) -> str:
        """The plain name, or an empty one."""
        own = self.own_filename()
        if own is not None:
            return own
        child = self.children.get(self.primary)
        if child is None:
            return self._opened_as or ""
        if child.is_protocol and not self.is_filter and not self._strong_options()[1]:
            return child.exact_filename
        return ""

    @property
    def full_options(self) -> dict[str, Any]:
        """The options that lead to this graph again, children's nested."""
        options, _ = self._strong_options()
        self.gather_children(options, self.backing_overridden)
        return options

    @property
    def backing_overridden(self) -> bool:
        """Whether what is below is not what the image itself says."""
        if not self.graph.io:
            return False
        child = self.children.get("backing")
        return self.auto_backing != ("" if child is None else child.filename)

    def _strong_options(self) -> tuple[dict[str, Any], bool]:
        """The options that a ``json:`` name needs, and whether it takes one to say them."""
        found: dict[str, Any] = {}
        needed = self.backing_overridden
        for key in ("driver", "filename"):
            if key in self.options:
                found[key] = self.options[key]
        for wanted in self.strong:
            for key, value in self.options.items():
                if key == wanted or (wanted.endswith(".") and key.startswith(wanted)):
                    found[key] = value
                    needed = True
        found.setdefault("driver", self.driver)
        return found, needed

    @property
    def directory(self) -> str:
        """The folder that relative names of backing files count from, with its slash. Raises
        OptionError where there is none."""
        child = self.children.get(self.primary)
        if child is not None:
            return child.directory
        if self.exact_filename:
            return naming.combine(self.exact_filename, "")
        raise OptionError(f"Cannot generate a base directory for {self.driver} nodes")

    @property
    def full_backing_filename(self) -> str:
        """The name of the backing file that the image gives, made to count from the working
        folder; empty where it gives none. Raises OptionError where that cannot be."""
        name = self.backing_file
        if not name or naming.has_protocol(name) or os.path.isabs(name):
            return name
        return self.directory + name

    # ---- The graph ----

    @property
    def backing(self) -> Node | None:
        return self.children.get("backing")

    @property
    def file(self) -> Node | None:
        return self.children.get("file")

    @property
    def chain(self) -> list[Node]:
        """This node and every backing node below it, from the top down."""
        chain = [self]
        while (below := chain[-1].backing) is not None:
            chain.append(below)
        return chain

    @property
    def backing_chain(self) -> list[Any]:
        """What holds the layers of :meth:`extents`, by depth."""
        return self.image.backing_chain if self.image is not None else [self.storage]

    @property
    def debug(self) -> Rules:
        """The rules of the blkdebug node that requests come to first, to set breakpoints. Raises
        OSError (ENOTSUP) where there is none."""
        child = self.children.get(self.primary)
        if child is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return child.debug

    def debug_breakpoint(self, event: str, tag: str) -> None:
        """Holds back the next request that comes to an event; see :attr:`debug`."""
        self.debug.suspend_at(event, tag)

    def debug_remove_breakpoint(self, tag: str) -> None:
        self.debug.remove_breakpoint(tag)

    def debug_resume(self, tag: str) -> None:
        self.debug.resume(tag)

    def debug_is_suspended(self, tag: str) -> bool:
        return self.debug.is_suspended(tag)

    def at_event(self, event: str) -> None:
        """Something happens to this node that its rules may be about, where it has any."""

    # ---- The disk ----

    @property
    def cluster_granularity(self) -> int:
        """The unit in which the top layer holds data, in bytes; 1 where there is none."""
        return 1

    @property
    def size(self) -> int:
        """Bytes, asked afresh: whole sectors, as QEMU counts them."""
        return -(-self._size() // SECTOR) * SECTOR

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """The runs that the disk is made of from ``offset`` on, in order; see
        :meth:`qcow2x.Image.extents`. Raises ValueError for a range outside the disk."""
        size = self.size
        end = size if length is None else offset + length
        if offset < 0 or end < offset or end > size:
            raise ValueError(f"{self.filename}: extents of a range outside the disk")
        return self._extents(offset, end)

    def pread(self, length: int, offset: int) -> bytes:
        """Up to ``length`` bytes from ``offset``; fewer only at the end of the disk."""
        data = bytearray(max(0, min(length, self.size - offset)))
        self.preadinto(data, offset)
        return bytes(data)

    def preadinto(self, buffer: Any, offset: int) -> int:
        """Fills ``buffer`` with the bytes from ``offset``; returns how many."""
        with memoryview(buffer).cast("B") as view:
            count = max(0, min(len(view), self.size - offset))
            if count and self.copy_on_read:
                from qcow2x.drivers.copy_on_read import read_and_copy

                with self.writing:
                    read_and_copy(self, view[:count], offset)
            elif count:
                self._read(view[:count], offset)
            return count

    def pwrite(self, data: Any, offset: int, *, fua: bool = False) -> int:
        """Writes all of ``data``; returns its length. ``fua``: durable at return."""
        with memoryview(data).cast("B") as view:
            self._check_write(offset, len(view))
            with self._beside_copies():
                if self.detect_zeroes != "off" and len(view) and _is_zero(view):
                    unmap = self.detect_zeroes == "unmap" and self.unmap
                    self._zero(offset, len(view), unmap, fua)
                elif len(view):
                    self._write(view, offset, fua)
            return len(view)

    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = False, fua: bool = False
    ) -> None:
        """Makes a range read as zeros; with ``unmap`` its space may be given back, if the node was
        opened with ``discard`` on."""
        self._check_write(offset, length)
        if length:
            with self._beside_copies():
                self._zero(offset, length, unmap and self.unmap, fua)

    def discard(self, offset: int, length: int) -> None:
        """Says that a range is not needed any more; nothing happens with ``discard`` off."""
        self._check_write(offset, length)
        if length and self.unmap:
            with self._beside_copies():
                self._discard(offset, length)

    def flush(self) -> None:
        """Everything written before is durable afterwards (nothing is done in mode unsafe)."""
        if self.writable:
            self._flush()

    def resize(self, size: int, *, shrink: bool = False, preallocation: str = "off") -> None:
        """Sets the size in bytes; what is added reads as zeros. Shrinking needs ``shrink``."""
        if not self.writable:
            raise PermissionError(errno.EACCES, f"{self.filename}: is open read-only")
        self._resize(size, shrink, preallocation)

    def close(self) -> None:
        """Flushes and closes this node and all below it. May be called more than once."""
        if self._closed:
            return
        self._closed = True
        try:
            self._close()
        finally:
            for child in self.children.values():
                child.close()

    # ---- How: on the storage, unless a driver has a better way ----

    def _size(self) -> int:
        return self.storage.size()

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        from qcow2x.types import Extent

        while offset < end:
            nbytes, kind = self.storage.extent(offset, end - offset)
            data = kind == "data"
            yield Extent(offset, nbytes, data, not data, False, 0, offset, self.storage.name)
            offset += nbytes

    def _read(self, view: memoryview, offset: int) -> None:
        got = self.storage.preadinto(view, offset)
        if got < len(view):
            # The last sector of a file that ends inside it.
            view[got:] = bytes(len(view) - got)

    def _write(self, view: memoryview, offset: int, fua: bool) -> None:
        self.storage.pwrite(view, offset, fua=fua)

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        self.storage.zero(offset, length, may_unmap=unmap)
        if fua:
            self.storage.flush()

    def _discard(self, offset: int, length: int) -> None:
        self.storage.punch(offset, length)

    def _reserve(self, offset: int, length: int) -> None:
        self.storage.reserve(offset, length)

    def _flush(self) -> None:
        self.storage.flush()

    def _resize(self, size: int, shrink: bool, preallocation: str) -> None:
        if preallocation not in ("off", "falloc", "full"):
            raise OptionError(f"Unsupported preallocation mode '{preallocation}'")
        old = self._size()
        if size < old and not shrink:
            raise ValueError(f"{self.filename}: shrinking from {old} to {size} needs shrink=True")
        self.storage.truncate(size)
        if size > old and preallocation == "falloc":
            self.storage.reserve(old, size - old)
        elif size > old and preallocation == "full":
            blank = memoryview(bytes(min(size - old, 1 << 20)))
            for at in range(old, size, len(blank)):
                self.storage.pwrite(blank[: size - at], at)

    def _close(self) -> None:
        """Lets go of what the driver itself opened, not of children."""

    def _beside_copies(self) -> AbstractContextManager[object]:
        """Keeps writes out of a copy-on-read that would undo them."""
        if self.copy_on_read:
            return self.writing
        from contextlib import nullcontext

        return nullcontext()

    def _check_write(self, offset: int, length: int) -> None:
        if not self.writable:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), self.filename)
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.filename)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if exc_type is None:
            self.close()
            return
        # What went wrong first is what is to be told, not what then could not be flushed.
        try:
            self.close()
        except Exception:
            pass

    def __repr__(self) -> str:
        return f"<{self.driver} node {self.filename!r}>"


def _is_zero(view: memoryview) -> bool:
    from qcow2x._core.bulk import is_zero

    return is_zero(view)
