"""Block drivers: what stands under a disk, and on top of it, as QEMU names and stacks it.

    from qcow2x.drivers import open_node

    with open_node("json:{'driver': 'qcow2', 'file': {'driver': 'file', 'filename': 'a'}}") as disk:
        disk.pread(512, 0)

:func:`open_node` follows the names that it finds inside images, as qemu-img does. For an image that
somebody else made use :func:`qcow2x.open`.
"""

from __future__ import annotations

from qcow2x.drivers.errors import OpenError, OptionError
from qcow2x.drivers.node import Node
from qcow2x.drivers.opening import open_node

__all__ = ["Node", "OpenError", "OptionError", "open_node"]
