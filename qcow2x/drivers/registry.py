"""The block drivers there are. One file each, imported when it is first asked for.

To add one: a :class:`qcow2x.drivers.node.Node` subclass in a file of its own, and a line here.
"""

from __future__ import annotations

import os
import stat
from importlib import import_module

from qcow2x.drivers import naming
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.node import Node

#: Driver name -> the module of this package and the class in it.
DRIVERS = {
    "blkdebug": ("blkdebug", "BlkdebugNode"),
    "compress": ("compress", "CompressNode"),
    "copy-on-read": ("copy_on_read", "CopyOnReadNode"),
    "file": ("file", "FileNode"),
    "host_cdrom": ("file", "HostCdromNode"),
    "host_device": ("file", "HostDeviceNode"),
    "luks": ("luks", "LuksNode"),
    "nbd": ("nbd", "NbdNode"),
    "null-co": ("null", "NullNode"),
    "qcow2": ("qcow2", "Qcow2Node"),
    "quorum": ("quorum", "QuorumNode"),
    "raw": ("raw", "RawNode"),
}

#: What stands before the colon of a file name -> driver.
PROTOCOLS = {
    "blkdebug": "blkdebug",
    "file": "file",
    "host_cdrom": "host_cdrom",
    "host_device": "host_device",
    "nbd": "nbd",
    "nbd+tcp": "nbd",
    "nbd+unix": "nbd",
    "null-co": "null-co",
}


def find_driver(name: str) -> type[Node]:
    """The class of a driver. Raises OptionError for one that is not there."""
    if name not in DRIVERS:
        raise OptionError(f"Unknown driver '{name}'")
    module, cls = DRIVERS[name]
    found: type[Node] = getattr(import_module(f"qcow2x.drivers.{module}"), cls)
    return found


def find_protocol(filename: str, allow_prefix: bool) -> type[Node]:
    """The driver at the bottom for a file name: by its protocol, and for a device by what it is."""
    if _is_device(filename):
        return find_driver("host_device")
    if not allow_prefix or not naming.has_protocol(filename):
        return find_driver("file")
    protocol = filename.split(":", 1)[0]
    if protocol not in PROTOCOLS:
        raise OptionError(f"Unknown protocol '{protocol}'")
    return find_driver(PROTOCOLS[protocol])


def _is_device(filename: str) -> bool:
    try:
        mode = os.stat(filename).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)
