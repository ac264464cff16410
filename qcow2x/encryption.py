"""Encrypted images: their keys, LUKS headers and key slots.

An image is encrypted with LUKS (section "Encryption", ``crypt_method`` 2) or in the legacy way
(``crypt_method`` 1, which is weak and only there for old images). Metadata is never encrypted, so
whatever asks for a disk's size, references or mapping needs no key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from qcow2x._core.luks import MAX_ITERATIONS, LuksHeader, legacy_cipher
from qcow2x.errors import FormatError, KeyRequired, UnsupportedFeature

if TYPE_CHECKING:
    from qcow2x._core.crypto import SectorCipher
    from qcow2x._core.header import Header
    from qcow2x._core.luksdisk import LuksDisk
    from qcow2x.storage import Storage

__all__ = [
    "MAX_ITERATIONS",
    "Encryption",
    "KeySlot",
    "KeySource",
    "LuksInfo",
    "add_key",
    "describe",
    "erase_key",
    "open_cipher",
]

Secret: TypeAlias = "bytes | bytearray | memoryview | str"

#: A passphrase: bytes, or text that stands for its UTF-8 bytes; a callable that gets the image's
#: name and returns one (or None); or a mapping from names to either. A bytearray that a callable
#: returns is wiped once it was used; nothing else of Python's can be.
KeySource: TypeAlias = "Secret | KeyCallable | Mapping[str, Secret | KeyCallable]"
KeyCallable: TypeAlias = "Callable[[str], Secret | None]"

FORMATS = ("luks", "aes")
HEADER_BYTES = 592
SLOTS = 8
#: Passes over key material that must not be readable afterwards, as the LUKS specification asks.
ERASE_PASSES = 4


@dataclass(frozen=True)
class Encryption:
    """How :func:`qcow2x.create` encrypts a new image.

    The defaults are QEMU's. ``iter_time_ms`` is how long opening it will take this machine: so
    long does each guess at the passphrase take as well. With ``format="aes"``, the legacy
    encryption, only the key counts.
    """

    key: KeySource = field(repr=False)
    format: str = "luks"
    #: ``aes-128``, ``aes-192`` or ``aes-256``.
    cipher: str = "aes-256"
    #: ``xts`` or ``cbc``.
    mode: str = "xts"
    #: ``plain64``, ``plain`` or ``essiv``.
    ivgen: str = "plain64"
    #: Only for ``essiv``.
    ivgen_hash: str | None = None
    #: ``sha1``, ``sha224``, ``sha256``, ``sha384``, ``sha512``, ``ripemd160`` or ``md5``.
    hash: str = "sha256"
    iter_time_ms: int = 2000

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"the encryption format must be luks or aes, not {self.format!r}")
        if not 0 < self.iter_time_ms <= 60_000:
            raise ValueError(f"iter_time_ms must be between 1 and 60000, not {self.iter_time_ms}")
        if self.format == "luks":
            self._new_header("new image")

    def _new_header(self, name: str) -> LuksHeader:
        ivgen_hash = self.ivgen_hash
        if self.ivgen == "essiv" and ivgen_hash is None:
            ivgen_hash = "sha256"
        return LuksHeader.new(self.cipher, self.mode, self.ivgen, self.hash, ivgen_hash, name)

    def header_bytes(self) -> int:
        """Bytes of the LUKS header with its key slots, behind which a LUKS disk's data begins; 0
        with the legacy encryption. Raises KeyRequired if ``key`` has no passphrase to give."""
        if self.format == "aes":
            return 0
        with passphrase(self.key, "new image"):
            return self._new_header("new image").payload_offset

    def refuse_preallocation(self, version: int) -> None:
        """What reads as zeros though it was never written needs the zero flag of version 3."""
        if version < 3:
            raise UnsupportedFeature(
                "an encrypted image of version 2 cannot be preallocated",
                features=(f"{self.format} encryption with preallocation",),
            )

    def new_area(self, name: str) -> bytes:
        """The header and key slots of a new image, with a fresh master key that ``key`` opens;
        nothing with the legacy encryption, whose key is its only setting."""
        if self.format == "aes":
            with passphrase(self.key, name):
                return b""
        with passphrase(self.key, name) as secret:
            return self._new_header(name).make_master_key(secret, self.iter_time_ms)


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One of the eight places for a passphrase."""

    active: bool
    iterations: int
    key_offset: int
    stripes: int


@dataclass(frozen=True, slots=True)
class LuksInfo:
    """What a LUKS header says of itself, without any key. Offsets are bytes from its start."""

    cipher: str
    mode: str
    ivgen: str
    ivgen_hash: str | None
    hash: str
    uuid: str
    payload_offset: int
    master_key_iterations: int
    slots: tuple[KeySlot, ...]


# --- passphrases ---------------------------------------------------------------------------


@contextmanager
def passphrase(source: object, name: str) -> Iterator[bytes | bytearray | memoryview]:
    """The passphrase for the image ``name``; what was made or handed over for it is wiped at the
    end. Raises KeyRequired where ``source`` has none."""
    ours = False
    if isinstance(source, Mapping):
        source = source.get(name)
    if callable(source):
        source, ours = source(name), True
    if source is None:
        raise key_required(name, "is encrypted and no key was given")
    if isinstance(source, str):
        source, ours = bytearray(source, "utf-8"), True
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise TypeError(f"{name}: a key must be bytes or text, not {type(source).__name__}")
    try:
        yield source
    finally:
        if ours and isinstance(source, bytearray):
            source[:] = bytes(len(source))


def key_required(name: str, what: str) -> KeyRequired:
    exc = KeyRequired(f"{name}: {what}")
    exc.path = name
    return exc


# --- opening -------------------------------------------------------------------------------


class _Area:
    """The LUKS header's place in an image file, or a file that is a LUKS disk by itself."""

    def __init__(self, storage: Storage, header: Header | None) -> None:
        place: tuple[int, int] | None = (0, storage.size())
        if header is not None:
            place = header.crypto_header if header.encryption == "luks" else None
        if place is None:
            raise FormatError(f"{storage.name}: the image is not encrypted with LUKS")
        self.storage = storage
        self.start, self.nbytes = place
        self.luks = LuksHeader.load(
            self.read(min(HEADER_BYTES, self.nbytes), 0),
            self.nbytes,
            storage.name,
            # A file by itself may be the header of a disk in another one.
            detached=header is None,
        )

    def read(self, length: int, offset: int) -> bytes:
        return self.storage.pread(length, self.start + offset)

    def write(self, data: bytes, offset: int) -> None:
        self.storage.pwrite(data, self.start + offset)
        self.storage.flush()

    def activate(self) -> None:
        """Writes the header over the old one: what its slots name must be in place before."""
        self.write(self.luks.encode(), 0)


def open_cipher(storage: Storage, header: Header, key: object) -> SectorCipher:
    """What decrypts the data of an encrypted image.

    Raises KeyRequired if ``key`` has none for it or the passphrase opens no slot, FormatError and
    UnsupportedFeature for a header that cannot be used. A legacy image cannot tell a wrong key
    from the right one. Trying a LUKS passphrase takes time by design: at most
    :data:`MAX_ITERATIONS` PBKDF2 iterations over all slots.
    """
    area = _Area(storage, header) if header.encryption == "luks" else None
    with passphrase(key, storage.name) as secret:
        cipher = legacy_cipher(secret) if area is None else area.luks.unlock(area.read, secret)
    if cipher is None:
        raise key_required(storage.name, "the key opens none of the image's key slots")
    return cipher


def load_container(storage: Storage, *, detached: bool = False) -> LuksHeader:
    """The header of a LUKS container, which is a whole file and not part of an image; ``detached``
    if what it is the header of is in another file. Raises FormatError and UnsupportedFeature for one
    that cannot be used."""
    head = storage.pread(HEADER_BYTES, 0)
    return LuksHeader.load(head, storage.size(), storage.name, detached=detached)


def open_container(
    storage: Storage,
    key: object,
    luks: LuksHeader | None = None,
    header_storage: Storage | None = None,
) -> LuksDisk:
    """The disk in a LUKS container; ``luks`` is its header, if that is loaded already, and
    ``header_storage`` the file that it is in, if that is another one. The storage stays the caller's
    to close, after the disk. Errors as :func:`open_cipher`."""
    from qcow2x._core.luksdisk import LuksDisk

    if luks is None:
        luks = load_container(storage)
    with passphrase(key, storage.name) as secret:
        cipher = luks.unlock((header_storage or storage).pread, secret)
    if cipher is None:
        raise key_required(storage.name, "the key opens none of the container's key slots")
    return LuksDisk(storage, cipher, luks.payload_offset)


def describe(storage: Storage, header: Header | None) -> LuksInfo:
    """What the LUKS header of an image says, or of a LUKS disk (``header`` None); needs no key.
    Errors as :func:`open_cipher`."""
    return info_of(_Area(storage, header).luks)


def info_of(luks: LuksHeader) -> LuksInfo:
    return LuksInfo(
        cipher=luks.cipher,
        mode=luks.mode,
        ivgen=luks.ivgen,
        ivgen_hash=luks.ivgen_hash,
        hash=luks.hash,
        uuid=luks.uuid,
        payload_offset=luks.payload_offset,
        master_key_iterations=luks.master_key_iterations,
        slots=tuple(KeySlot(*slot) for slot in luks.slots),
    )


# --- key slots -----------------------------------------------------------------------------


def add_key(
    storage: Storage,
    header: Header | None,
    key: object,
    new_key: object,
    *,
    slot: int | None = None,
    iter_time_ms: int = 2000,
    force: bool = False,
) -> int:
    """Makes ``new_key`` open the image as well; returns the slot that it got.

    ``slot`` is 0 to 7 and must be free, unless ``force`` lets the new key replace what is there; by
    default the first that is free. ``header`` is that of the qcow2 image in ``storage``, None where
    the storage is a LUKS disk by itself. Durable at return; a crash meanwhile leaves the slots as
    they were, but for one that is replaced, which may then be lost. The storage must be open for
    writing and the image locked by the caller. Raises KeyRequired if ``key`` opens no slot,
    ValueError if no slot is free.
    """
    area = _Area(storage, header)
    if slot is None:
        free = [i for i, (active, *_) in enumerate(area.luks.slots) if not active]
        if not free:
            raise ValueError(f"{storage.name}: Can't add a keyslot - all keyslots are in use")
        slot = free[0]
    elif not 0 <= slot < SLOTS:
        raise ValueError(
            f"{storage.name}: Invalid keyslot {slot} specified, must be between 0 and {SLOTS - 1}"
        )
    elif area.luks.slots[slot][0] and not force:
        raise ValueError(
            f"{storage.name}: Refusing to overwrite active keyslot {slot} - please erase it first"
        )
    with passphrase(key, storage.name) as old, passphrase(new_key, storage.name) as new:
        material = area.luks.add_key(area.read, old, new, slot, iter_time_ms)
    if material is None:
        raise key_required(storage.name, "the key opens none of the image's key slots")
    area.write(material, area.luks.slots[slot][2])
    area.activate()
    return slot


def erase_key(
    storage: Storage,
    header: Header | None,
    *,
    slot: int | None = None,
    key: object = None,
    force: bool = False,
) -> list[int]:
    """Makes a key slot useless for good: the one numbered ``slot``, or all that ``key`` opens.

    Returns the slots erased. The key material is overwritten durably before the slot is marked
    disabled; on storage that keeps old blocks (snapshots, flash) they may be found there. The last
    active slot is erased only with ``force``: nothing opens the image afterwards. A slot that is
    not active is overwritten once more with ``force`` only. ``header`` as for :func:`add_key`.
    Raises KeyRequired if ``key`` opens no slot, ValueError.
    """
    if (slot is None) == (key is None):
        raise ValueError("erase_key takes either slot= or key=")
    area = _Area(storage, header)
    active = [i for i, (is_active, *_) in enumerate(area.luks.slots) if is_active]
    if slot is not None:
        if not 0 <= slot < SLOTS:
            raise ValueError(
                f"{storage.name}: Invalid keyslot {slot} specified, must be between 0 and "
                f"{SLOTS - 1}"
            )
        if slot not in active and not force:
            raise ValueError(f"{storage.name}: Given keyslot {slot} is already erased (inactive) ")
        doomed = [slot]
    else:
        with passphrase(key, storage.name) as secret:
            doomed = area.luks.slots_of(area.read, secret)
        if not doomed:
            raise key_required(
                storage.name, "No keyslots match given (old) password for erase operation"
            )
    if set(doomed) >= set(active) and not force:
        which = (
            "All the active keyslots match the (old) password that was given and erasing them will"
            if slot is None
            else f"Attempt to erase the only active keyslot {slot} which will"
        )
        raise ValueError(
            f"{storage.name}: {which} erase all the data in the image irreversibly - refusing "
            "operation"
        )
    for number in doomed:
        offset = area.luks.slots[number][2]
        for _ in range(ERASE_PASSES):
            area.write(os.urandom(area.luks.material_bytes), offset)
        area.luks.erase_key(number)
        area.activate()
    return doomed
