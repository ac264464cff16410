"""A LUKS container seen as a disk."""

from __future__ import annotations

from typing import Any

from qcow2x.ops.disk import RawDisk


class LuksFile(RawDisk):
    """The disk in a LUKS container: a file, block device, descriptor or storage object.

    *key* is as for :func:`qcow2x.open`. Raises what :class:`RawDisk` raises, FormatError for what is
    no LUKS container, and KeyRequired.
    """

    format = "luks"

    def __init__(
        self,
        source: Any,
        mode: str = "r",
        cache: str = "writeback",
        *,
        key: Any,
        lock: bool = False,
    ) -> None:
        from qcow2x._core.luks import LuksHeader
        from qcow2x._core.luksdisk import LuksDisk
        from qcow2x.encryption import HEADER_BYTES, key_required, passphrase

        self._container = RawDisk(source, mode, cache, lock=lock)
        try:
            file = self._container._storage
            header = LuksHeader.load(file.pread(HEADER_BYTES, 0), file.size(), file.name)
            with passphrase(key, file.name) as secret:
                cipher = header.unlock(file.pread, secret)
            if cipher is None:
                raise key_required(file.name, "the key opens none of the container's key slots")
            super().__init__(LuksDisk(file, cipher, header.payload_offset), mode)
        except BaseException:
            self._container.close()
            raise

    def close(self) -> None:
        super().close()
        self._container.close()
