"""What a Python object needs to be storage, for type checkers."""

from __future__ import annotations

from typing import Any, Protocol


class Readable(Protocol):
    """What an object needs to be read as storage. Offsets and lengths are bytes."""

    def size(self) -> int:
        """How many bytes there are."""

    def pread(self, length: int, offset: int, /) -> Any:
        """Up to ``length`` bytes from ``offset``; none only at or past the end."""


class Writable(Readable, Protocol):
    """What it needs besides to be written."""

    def pwrite(self, buffer: Any, offset: int, /) -> int:
        """Take some or all of ``buffer`` for ``offset``; returns how many bytes. May extend."""

    def flush(self) -> object:
        """When this returns, everything written before is durable."""

    def truncate(self, size: int, /) -> object:
        """Be ``size`` bytes long from now on; what is new reads as zeros."""
