"""``luks``: a LUKS container that holds a raw disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcow2x.drivers import options as opts
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.node import Node
from qcow2x.drivers.options import Options

if TYPE_CHECKING:
    from qcow2x._core.luks import LuksHeader
    from qcow2x._core.storage import Storage
    from qcow2x.encryption import LuksInfo


class LuksNode(Node):
    driver = "luks"
    is_format = True
    strong = ("key-secret",)

    #: Read without any key.
    header: LuksHeader
    #: Where it is: in the file, or in the child ``header`` if there is one.
    header_file: Storage

    def open(self, options: Options) -> None:
        from qcow2x.encryption import load_container, open_container

        secret = opts.take_text(options, "key-secret")
        key = None
        if self.graph.io:
            if secret is None:
                raise OptionError("Parameter 'key-secret' is required for cipher")
            key = self.graph.secret(secret)
        file = self.children["file"].storage
        beside = self.graph.open_child(self, "header", options, optional=True)
        self.header_file = file if beside is None else beside.storage
        self.header = load_container(self.header_file, detached=beside is not None)
        if key is not None:
            self.storage = open_container(file, key, self.header, self.header_file)

    @property
    def luks(self) -> LuksInfo:
        """What the container says of itself."""
        from qcow2x.encryption import info_of

        return info_of(self.header)

    def _size(self) -> int:
        return max(0, self.children["file"].size - self.header.payload_offset)
