"""The ``-l`` of convert and measure: which internal snapshot of a source is meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcow2x.cli.report import CommandError, report

if TYPE_CHECKING:
    from qcow2x.drivers import Node

PREFIX = "snapshot."
_KEYS = ("snapshot.id", "snapshot.name")


class Wanted:
    """A snapshot by name or id: ``-l NAME``, or ``-l snapshot.id=ID,snapshot.name=NAME``, where all
    that is given has to fit. Raises CommandError."""

    def __init__(self, text: str) -> None:
        self.key: str | None = text
        self.id: str | None = None
        self.name: str | None = None
        if text.startswith(PREFIX):
            self.key = None
            self._parse(text)

    def _parse(self, text: str) -> None:
        from qcow2x.cli.formatopts import split_options

        for name, value in split_options(text):
            if name not in _KEYS:
                report(f"Invalid parameter '{name}'")
                raise CommandError(f"Failed in parsing snapshot param '{text}'")
            if name == "snapshot.id":
                self.id = value or ""
            else:
                self.name = value or ""

    def open(self, node: Node) -> Any:
        """The disk of *node* as the snapshot holds it; to be closed before the node. Raises
        CommandError if there is none like that."""
        from qcow2x.cli.words import reason
        from qcow2x.errors import Qcow2Error

        problem = "Failed to load snapshot: "
        if node.image is None:
            raise CommandError(
                f"{problem}Block format '{node.driver}' used by device '' does not support "
                "temporarily loading internal snapshots"
            )
        snapshots = node.image.snapshots
        try:
            for snapshot in snapshots:
                if self.key is None and self._fits(snapshot):
                    return snapshots.open(snapshot.id)
            if self.key is not None:
                return snapshots.open(self.key)
        except KeyError:
            pass
        except (OSError, Qcow2Error) as exc:
            raise CommandError(problem + reason(exc)) from exc
        raise CommandError(f"{problem}Can't find snapshot")

    def _fits(self, snapshot: Any) -> bool:
        return self.id in (None, snapshot.id) and self.name in (None, snapshot.name)
