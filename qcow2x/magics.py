"""Formats known by their magic bytes, to name what a file is, or is besides qcow2.

A raw disk has no magic and is never guessed: what nothing here knows is ``"unknown"``.
"""

from __future__ import annotations

QCOW2_MAGIC = b"QFI\xfb"


class Magic:
    def __init__(self, offset: int, magic: bytes, format: str) -> None:
        self.offset = offset
        self.magic = magic
        self.format = format


# What a file is by its first bytes; the first that fits wins.
_AT_START = (
    (b"QFI\xfb\0\0\0\x01", "qcow1"),
    (QCOW2_MAGIC, "qcow2"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vhd"),
    (b"LUKS\xba\xbe", "luks"),
    (b"QED\0", "qed"),
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"PK\x03\x04", "zip"),
    (b"\x7fELF", "elf"),
)

#: Formats that leave their first bytes free, so that one file can be both them and qcow2.
LATER = (
    Magic(0x40, b"\x7f\x10\xda\xbe", "vdi"),
    Magic(257, b"ustar", "tar"),
    Magic(510, b"\x55\xaa", "mbr"),
    Magic(512, b"EFI PART", "gpt"),
    Magic(4096, b"EFI PART", "gpt"),
    Magic(512, b"LABELONE", "lvm"),
    Magic(1080, b"\x53\xef", "ext"),
    Magic(4086, b"SWAPSPACE2", "swap"),
    Magic(32769, b"CD001", "iso9660"),
    Magic(34817, b"CD001", "iso9660"),
    Magic(32769, b"NSR0", "udf"),
)
#: Bytes from the start of a file within which every magic above lies.
REACH = 34822


def format_of(head: bytes, tail: bytes = b"") -> str:
    """The name of the format, from the first REACH and the last 512 bytes of a file."""
    for magic, name in _AT_START:
        if head.startswith(magic):
            return name
    found = later_formats(head)
    # A disk with a GPT has a protective MBR as well; a bootable ISO has both.
    for name in ("iso9660", "udf", "gpt"):
        if any(magic.format == name for magic in found):
            return name
    if found:
        return found[0].format
    return "vhd" if has_vhd_footer(tail) else "unknown"


def later_formats(head: bytes) -> list[Magic]:
    """The magics of LATER that are there."""
    return [entry for entry in LATER if head.startswith(entry.magic, entry.offset)]


def has_vhd_footer(tail: bytes) -> bool:
    """Whether the last bytes of a file are the footer by which a fixed VHD is known: the cookie and
    a checksum that fits, for a guest's data may hold the cookie by chance."""
    footer = tail[-512:]
    if len(footer) < 512 or not footer.startswith(b"conectix"):
        return False
    stored = int.from_bytes(footer[64:68], "big")
    return (~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF) == stored
