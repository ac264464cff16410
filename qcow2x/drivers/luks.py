"""``luks``: a LUKS container that holds a raw disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcow2x.drivers import options as opts
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.node import Node
from qcow2x.drivers.options import Options

if TYPE_CHECKING:
    from qcow2x._core.luks import LuksHeader


class LuksNode(Node):
    driver = "luks"
    is_format = True
    strong = ("key-secret",)

    #: What the container says of itself; needs no key.
    header: LuksHeader

    def open(self, options: Options) -> None:
        from qcow2x._core.luks import LuksHeader
        from qcow2x.encryption import HEADER_BYTES

        secret = opts.take_text(options, "key-secret")
        key = None
        if self.graph.io:
            if secret is None:
                raise OptionError("Parameter 'key-secret' is required for cipher")
            key = self.graph.secret(secret)
        file = self.children["file"].storage
        size = file.size()
        self.header = LuksHeader.load(file.pread(HEADER_BYTES, 0), size, file.name)
        if key is None:
            return
        from qcow2x._core.luksdisk import LuksDisk
        from qcow2x.encryption import key_required

        cipher = self.header.unlock(file.pread, key)
        if cipher is None:
            raise key_required(file.name, "the key opens none of the container's key slots")
        self.storage = LuksDisk(file, cipher, self.header.payload_offset)

    def _size(self) -> int:
        return max(0, self.children["file"].size - self.header.payload_offset)
