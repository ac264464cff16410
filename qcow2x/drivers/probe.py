"""What format a file has, by its first bytes."""

from __future__ import annotations

from qcow2x.magics import format_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcow2x.drivers.node import Node

#: QEMU looks no further.
PROBE_BYTES = 512

#: Formats of magics.py by the names of QEMU's drivers. What is not here is a raw disk's content.
_DRIVER_OF = {
    "qcow2": "qcow2",
    "luks": "luks",
    "qcow1": "qcow",
    "vmdk": "vmdk",
    "vhdx": "vhdx",
    "vhd": "vpc",
    "qed": "qed",
    "parallels": "parallels",
    "vdi": "vdi",
}


def probe(file: Node) -> str:
    """The driver for what a node holds; ``raw`` for everything that nothing claims. A format that
    is known but has no driver here is named all the same, for it is no raw disk."""
    if file.size == 0:
        return "raw"
    return probe_bytes(file.pread(PROBE_BYTES, 0))


def probe_bytes(head: bytes) -> str:
    return _DRIVER_OF.get(format_of(head), "raw")
