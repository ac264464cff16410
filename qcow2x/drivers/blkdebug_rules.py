"""The rules of a ``blkdebug`` node: at which event what happens, and what fails from then on."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from qcow2x.drivers import options as opts
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.options import Options
from qcow2x.errors import NoSpace, StorageError

EVENTS = frozenset(
    """l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update
    l2_update_compressed l2_alloc_cow_read l2_alloc_write read_aio read_backing_aio read_compressed
    write_aio write_compressed vmstate_load vmstate_save cow_read cow_write reftable_load
    reftable_grow reftable_update refblock_load refblock_update refblock_update_part refblock_alloc
    refblock_alloc_hookup refblock_alloc_write refblock_alloc_write_blocks
    refblock_alloc_write_table refblock_alloc_switch_table cluster_alloc cluster_alloc_bytes
    cluster_free flush_to_os flush_to_disk pwritev_rmw_head pwritev_rmw_after_head pwritev_rmw_tail
    pwritev_rmw_after_tail pwritev pwritev_zero pwritev_done empty_image_prepare
    l1_shrink_write_table l1_shrink_free_l2_clusters cor_write cluster_alloc_space none""".split()
)
IO_TYPES = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
_DEFAULT_IO_TYPES = frozenset(IO_TYPES) - {"block-status"}
_GROUPS = ("inject-error", "set-state")
_SECTOR = 512


@dataclass
class Rule:
    """What happens at an event, if the node is in ``state`` (0: in any)."""

    action: str
    event: str
    state: int = 0
    # inject-error
    number: int = errno.EIO
    io_types: frozenset[str] = _DEFAULT_IO_TYPES
    offset: int | None = None
    once: bool = False
    delay_ns: int = 0
    # set-state
    new_state: int = 0
    # suspend
    tag: str = ""


class Rules:
    """The rules in force, and the requests that they hold back. Any thread may call."""

    def __init__(self) -> None:
        self._of: dict[str, list[Rule]] = defaultdict(list)
        self._active: list[Rule] = []
        self._state = 1
        self._changed = threading.Condition()
        self._suspended: list[str] = []
        self._resumed: list[str] = []

    def add(self, rule: Rule) -> None:
        with self._changed:
            # The newest first, as QEMU keeps them.
            self._of[rule.event].insert(0, rule)

    # ---- What the node's user does ----

    def event(self, name: str) -> None:
        """The node's user is at an event. Returns when nothing holds it back any more."""
        if not self._of.get(name):
            return
        with self._changed:
            state = self._state
            injecting = False
            held: list[str] = []
            for rule in list(self._of[name]):
                if rule.state and rule.state != self._state:
                    continue
                if rule.action == "inject-error":
                    if not injecting:
                        self._active = []
                    injecting = True
                    self._active.insert(0, rule)
                elif rule.action == "set-state":
                    state = rule.new_state
                else:
                    self._of[name].remove(rule)
                    self._suspended.insert(0, rule.tag)
                    held.append(rule.tag)
            self._state = state
            for tag in held:
                print(f"blkdebug: Suspended request '{tag}'", flush=True)
            self._changed.notify_all()
            for tag in held:
                self._changed.wait_for(lambda tag=tag: tag in self._resumed)  # type: ignore[misc]
                self._resumed.remove(tag)

    def check(self, offset: int, nbytes: int, io_type: str, name: str) -> None:
        """Raises StorageError or NoSpace if a rule says that this access fails."""
        if not self._active:
            return
        with self._changed:
            for rule in self._active:
                hit = rule.offset is None or offset <= rule.offset < offset + nbytes
                if hit and io_type in rule.io_types:
                    break
            else:
                return
            if rule.once:
                self._active.remove(rule)
                self._of[rule.event].remove(rule)
        if rule.delay_ns:
            time.sleep(rule.delay_ns / 1e9)
        if not rule.number:
            return
        kind = NoSpace if rule.number == errno.ENOSPC else StorageError
        exc = kind(rule.number, f"{name}: {io_type} failed, as a rule has it")
        exc.path = name
        raise exc

    # ---- Breakpoints ----

    def suspend_at(self, event: str, tag: str) -> None:
        """Holds back the next request that comes to ``event``. Raises OSError (ENOENT) for an event
        that is none."""
        if event not in EVENTS:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        self.add(Rule("suspend", event, tag=tag))

    def is_suspended(self, tag: str) -> bool:
        with self._changed:
            return tag in self._suspended

    def wait_suspended(self, tag: str) -> None:
        """Returns once a request is held back under ``tag``."""
        with self._changed:
            self._changed.wait_for(lambda: tag in self._suspended)

    def resume(self, tag: str, every: bool = False) -> None:
        """Lets a request go on. Raises OSError (ENOENT) if none is held back under ``tag``."""
        with self._changed:
            if tag not in self._suspended:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            while tag in self._suspended:
                print(f"blkdebug: Resuming request '{tag}'", flush=True)
                self._suspended.remove(tag)
                self._resumed.append(tag)
                if not every:
                    break
            self._changed.notify_all()

    def remove_breakpoint(self, tag: str) -> None:
        """Forgets breakpoints and lets all requests go on that are held back under ``tag``. Raises
        OSError (ENOENT) if there are none of either."""
        found = False
        with self._changed:
            for rules in self._of.values():
                for rule in [r for r in rules if r.action == "suspend" and r.tag == tag]:
                    rules.remove(rule)
                    found = True
            held = tag in self._suspended
        if held:
            self.resume(tag, every=True)
        elif not found:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))


# ---- Where rules come from -----------------------------------------------------------------------


def take_rules(options: Options, config: str | None) -> Rules:
    """The rules of a configuration file and of options, which are removed from ``options``."""
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in _GROUPS}
    if config is not None:
        _read_config(config, groups)
    for name in _GROUPS:
        numbered: dict[int, dict[str, Any]] = defaultdict(dict)
        for key, value in opts.take_below(options, name).items():
            index, dot, field = key.partition(".")
            if not dot or not index.isdigit():
                raise OptionError(f"Unused option '{key}' in [{name}]")
            numbered[int(index)][field] = value
        groups[name] += [numbered[index] for index in sorted(numbered)]
    rules = Rules()
    for name in _GROUPS:
        for section in groups[name]:
            rules.add(_rule(name, dict(section)))
    return rules


_SECTION = re.compile(r"\s*\[([^\s\]]+)(?:\s+\"[^\"]*\")?\]\s*$")
_SETTING = re.compile(r"\s*(\S+)\s*=\s*\"([^\"]*)\"\s*$")


def _read_config(path: str, groups: dict[str, list[dict[str, Any]]]) -> None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError as exc:
        raise OptionError(
            f"Could not read blkdebug config file: {os.strerror(exc.errno or errno.EIO)}"
        ) from None
    section: dict[str, Any] | None = None
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if (match := _SECTION.match(line)) is not None:
            if match[1] not in groups:
                raise OptionError(f"There is no option group '{match[1]}'")
            section = {}
            groups[match[1]].append(section)
        elif (match := _SETTING.match(line)) is not None:
            if section is None:
                raise OptionError("no group defined")
            section[match[1]] = match[2]
        else:
            raise OptionError("parse error")


def _rule(action: str, given: Options) -> Rule:
    event = opts.take_text(given, "event")
    if event is None:
        raise OptionError("Missing event name for rule")
    if event not in EVENTS:
        raise OptionError(f"invalid parameter value: {event}")
    rule = Rule(action, event, state=opts.take_number(given, "state") or 0)
    if action == "set-state":
        rule.new_state = opts.take_number(given, "new_state") or 0
    else:
        number = opts.take_number(given, "errno")
        rule.number = errno.EIO if number is None else number
        rule.once = opts.take_bool(given, "once")
        opts.take_bool(given, "immediately")
        rule.delay_ns = opts.take_number(given, "delay-ns") or 0
        sector = opts.take_number(given, "sector")
        if sector is not None and sector != (1 << 64) - 1:
            rule.offset = sector * _SECTOR
        io_type = opts.take_text(given, "iotype")
        if io_type is not None:
            if io_type not in IO_TYPES:
                raise OptionError(f"invalid parameter value: {io_type}")
            rule.io_types = frozenset((io_type,))
    if given:
        raise OptionError(f"Invalid parameter '{next(iter(given))}'")
    return rule
