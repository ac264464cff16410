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
        from qcow2x.encryption import open_container

        self._container = RawDisk(source, mode, cache, lock=lock)
        try:
            super().__init__(open_container(self._container._storage, key), mode)
        except BaseException:
            self._container.close()
            raise

    def close(self) -> None:
        super().close()
        self._container.close()
