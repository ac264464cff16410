"""What the commands of one run share: the open file, the requests under way, the keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qcow2x.cli.report import CommandError

if TYPE_CHECKING:
    from qcow2x.cli.io.background import Background
    from qcow2x.cli.io.disk import Disk
    from qcow2x.cli.io.language import Language
    from qcow2x.drivers.blkdebug_rules import Rules

#: cache mode -> (how the node is opened, whether each write is made durable at once).
CACHE_MODES = {
    "off": ("none", False),
    "none": ("none", False),
    "directsync": ("none", True),
    "writeback": ("writeback", False),
    "unsafe": ("unsafe", False),
    "writethrough": ("writeback", True),
}
DISCARD_MODES = {"off": False, "ignore": False, "on": True, "unmap": True}
AIO_MODES = ("threads", "native", "io_uring")


@dataclass(frozen=True)
class Opening:
    """All that was said when a file was opened; ``reopen`` changes some of it and does it again."""

    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    writable: bool = True
    cache: str = "writeback"
    durable: bool = True
    discard: bool = True
    aio: str = "threads"
    force_share: bool = False
    copy_on_read: bool = False
    #: Writes go to an overlay that ends with the program.
    snapshot: bool = False

    def with_cache(self, mode: str) -> Opening:
        if mode not in CACHE_MODES:
            raise CommandError(f"Invalid cache option: {mode}")
        cache, durable = CACHE_MODES[mode]
        return replace(self, cache=cache, durable=durable)

    def with_aio(self, mode: str) -> Opening:
        """Requests are made by threads whatever is asked for; what QEMU refuses is refused."""
        if mode not in AIO_MODES:
            raise CommandError(f"Invalid aio option: {mode}")
        return replace(self, aio=mode)

    def with_discard(self, mode: str) -> Opening:
        if mode not in DISCARD_MODES:
            raise CommandError(f"Invalid discard option: {mode}")
        return replace(self, discard=DISCARD_MODES[mode])

    def with_options(self, options: Mapping[str, Any]) -> Opening:
        return replace(self, options={**self.options, **options})


class Session:
    """One run of the program."""

    def __init__(self, language: Language, secrets: Callable[[], dict[str, bytes]]) -> None:
        self.language = language
        self.image_opts = False
        self.misalign = False
        self.quitting = False
        self.disk: Disk | None = None
        self.opening = Opening()
        self._secrets = secrets
        self._background: Background | None = None

    @property
    def open_disk(self) -> Disk:
        """The disk of a command that is not run without one."""
        assert self.disk is not None
        return self.disk

    # ---- Requests beside the commands ----

    @property
    def background(self) -> Background:
        if self._background is None:
            from qcow2x.cli.io.background import Background

            self._background = Background()
        return self._background

    def turn(self) -> None:
        """Tells of requests that have ended meanwhile."""
        if self._background is not None:
            self._background.turn()

    def drain(self) -> None:
        """Waits for all requests and tells of them."""
        if self._background is not None:
            self._background.drain()

    # ---- The file ----

    def open(self, opening: Opening) -> None:
        """Raises CommandError, in QEMU's words."""
        if self.disk is not None:
            raise CommandError("file open already, try 'help close'")
        if opening.force_share and opening.options.get("force-share", "on") != "on":
            raise CommandError("-U conflicts with image options")
        try:
            self._open(opening)
        except Exception as exc:
            from qcow2x.cli import words
            from qcow2x.cli.io.disk import is_expected

            if not is_expected(exc):
                raise
            device = "" if opening.name is None else f" device {opening.name}"
            raise CommandError(f"can't open{device}: {words.reason(exc)}{words.hint(exc)}") from exc

    def _open(self, opening: Opening, rules: Mapping[str, list[Rules]] | None = None) -> None:
        from qcow2x.cli.io.disk import Disk
        from qcow2x.drivers import open_node

        node: Any = open_node(
            {} if opening.name is None else opening.name,
            options=opening.options,
            writable=opening.writable and not opening.snapshot,
            cache=opening.cache,
            force_share=opening.force_share,
            discard=opening.discard,
            copy_on_read=opening.copy_on_read,
            aio=opening.aio,
            rules=rules,
            secrets=self._secrets(),
        )
        if opening.snapshot:
            from qcow2x.cli.io.overlay import Overlay

            node = Overlay(node, writable=opening.writable)
        elif node.probed and node.driver == "raw" and opening.writable:
            _warn_of_probing(node.filename)
        if node.image is not None and node.image.rebuilt is not None:
            from qcow2x.cli.opening import tell_rebuilt

            tell_rebuilt(node.image)
        self.opening = opening
        self.disk = Disk(node, durable=opening.durable)

    def close(self) -> None:
        """Waits for requests, then closes the file, if one is open. Raises what its close raises."""
        disk, self.disk = self.disk, None
        if disk is not None:
            self.drain()
            disk.close()

    def reopen(self, opening: Opening) -> None:
        """Opens the file that is open in another way. If that fails it stays open as it was; raises
        CommandError."""
        from qcow2x.cli import words
        from qcow2x.cli.io.disk import is_expected

        before = self.opening
        rules = _rules_below(self.open_disk.node)
        self.close()
        try:
            self._open(opening, {key: list(kept) for key, kept in rules.items()})
        except Exception as exc:
            self._open(before, rules)
            if not is_expected(exc):
                raise
            raise CommandError(f"{words.reason(exc)}{words.hint(exc)}") from exc


def _rules_below(node: Any) -> dict[str, list[Rules]]:
    """The rules of blkdebug nodes, which outlive a change of other options."""
    found: dict[str, list[Rules]] = {}
    for child in getattr(node, "children", {}).values():
        for key, rules in _rules_below(child).items():
            found.setdefault(key, []).extend(rules)
    own = getattr(node, "rules_key", None)
    if own is not None:
        found.setdefault(own, []).append(node.rules)
    return found


def _warn_of_probing(name: str) -> None:
    import sys

    print(
        f"WARNING: Image format was not specified for '{name}' and probing guessed raw.\n"
        "         Automatically detecting the format is dangerous for raw images, write"
        " operations on block 0 will be restricted.\n"
        "         Specify the 'raw' format explicitly to remove the restrictions.",
        file=sys.stderr,
    )
