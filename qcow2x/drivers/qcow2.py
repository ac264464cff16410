"""``qcow2``: the engine of this package as a driver."""

from __future__ import annotations

from qcow2x.drivers import qcow2_options
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.node import Node
from qcow2x.drivers.options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from qcow2x._core.header import Header
    from qcow2x.types import Extent


class Qcow2Node(Node):
    driver = "qcow2"
    is_format = True
    supports_backing = True
    strong = ("encrypt.key-secret",)

    #: What the file says of itself; of an image that is open for reading see ``image`` as well.
    header: Header

    def open(self, options: Options) -> None:
        from qcow2x._core.header import Header

        below = self.children["file"]
        file = below.storage
        if self.graph.checking:
            from qcow2x.ops.check import load_header

            self.header = header = load_header(file)
        else:
            self.header = header = Header.load(file.pread, below._size(), file.name)
        header.require_supported(file.name)
        if header.nb_snapshots and not self.graph.checking:
            from qcow2x.snapshot import check_limits

            check_limits(file, header)
        self.backing_file = self.auto_backing = header.backing_file or ""
        self.backing_format = header.backing_format or None
        self._settings = qcow2_options.take(options, header, self.unmap)
        self._open_data_file(options)
        if self.graph.io and header.encryption is not None and self._settings.key_secret is None:
            raise OptionError("Parameter 'encrypt.key-secret' is required for cipher")

    def _open_data_file(self, options: Options) -> None:
        given = "data-file" in options or any(key.startswith("data-file.") for key in options)
        if not self.header.has_data_file:
            if given:
                raise OptionError(
                    "'data-file' can only be set for images with an external data file"
                )
            return
        name = None if given else self.header.data_file
        if name is None and not given:
            raise OptionError("'data-file' is required for this image")
        self.graph.open_child(self, "data-file", options, name)

    def complete(self, backing: Node | None) -> None:
        if not self.graph.io:
            # Only looked at: neither a key nor the tables are needed.
            return
        import qcow2x
        from qcow2x.backing import GuestDisk

        below: Any = None
        if self.header.backing_file is not None or backing is not None:
            withheld = backing is None and not self.no_backing
            below = False if withheld else GuestDisk(None if backing is None else backing.storage)
        data = self.children.get("data-file")
        settings = self._settings
        secret = settings.key_secret
        self.image = qcow2x.open(
            self.children["file"].storage,
            "r+" if self.writable else "r",
            cache=self.graph.cache_mode(self.options),
            lock=False,
            backing=below,
            data_file=None if data is None else data.storage,
            key=None if self.header.encryption is None else self.graph.secret(secret or ""),
            l2_cache_size=settings.l2_cache_size,
            overlap_check=settings.overlap_check,
            discard_to_host=settings.discard_to_host,
            lazy_refcounts=settings.lazy_refcounts,
        )
        if self.writable and self.header.bitmap_directory is not None:
            from qcow2x.bitmap import mark_in_use

            mark_in_use(self.image)
        self.storage = self.image

    def join_options(self, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
        return qcow2_options.join(new, old)

    @property
    def cluster_size(self) -> int:
        return self.header.cluster_size

    @property
    def cluster_granularity(self) -> int:
        return self.header.cluster_size // (32 if self.header.extended_l2 else 1)

    def _size(self) -> int:
        return self.header.size if self.image is None else self.image.size

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        assert self.image is not None
        return self.image.extents(offset, end - offset)

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        assert self.image is not None
        self.image.write_zeroes(offset, length, unmap=unmap, fua=fua)

    def _discard(self, offset: int, length: int) -> None:
        assert self.image is not None
        self.image.discard(offset, length)

    def _resize(self, size: int, shrink: bool, preallocation: str) -> None:
        assert self.image is not None
        self.image.resize(size, shrink=shrink, preallocation=preallocation)

    def _close(self) -> None:
        if self.image is not None:
            self.image.close()
