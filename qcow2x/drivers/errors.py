"""What can go wrong while a graph of block drivers is opened, besides the library's own errors."""

from __future__ import annotations

from qcow2x.errors import Qcow2Error


class OptionError(Qcow2Error, ValueError):
    """An option, or a combination of them, that no driver accepts. ``hint`` is more to say."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class OpenError(Qcow2Error):
    """Opening a node failed while something larger was going on: ``doing`` says what, the cause
    (``__cause__``) says why."""

    def __init__(self, doing: str, cause: BaseException) -> None:
        super().__init__(f"{doing}: {cause}")
        self.doing = doing
        self.__cause__ = cause
