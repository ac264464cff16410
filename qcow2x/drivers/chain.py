"""Finding a layer of a backing chain by name, as QEMU's tools do it."""

from __future__ import annotations

import os

from qcow2x.drivers import naming
from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.node import Node


def skip_filters(node: Node) -> Node:
    """The node that has the content, below those that only do something on the way."""
    while node.is_filter:
        node = node.children[node.primary]
    return node


def below(node: Node) -> Node | None:
    """The next layer of a chain, without filters."""
    backing = skip_filters(node).backing
    return None if backing is None else skip_filters(backing)


def find_backing(top: Node, name: str) -> Node | None:
    """The layer below *top* that *name* stands for, or None. A path is relative to the folder of
    the layer that names it, and the same as another that leads to the same file; names with a
    protocol are compared as they stand."""
    layer = skip_filters(top)
    while (lower := below(layer)) is not None:
        if _is_called(layer, lower, name):
            return lower
        layer = lower
    return None


def _is_called(layer: Node, lower: Node, name: str) -> bool:
    if layer.backing_overridden:
        return name == lower.filename
    try:
        full = layer.full_backing_filename
        if naming.has_protocol(name) or naming.has_protocol(layer.backing_file):
            return name in (layer.backing_file, full)
        wanted = name if os.path.isabs(name) else layer.directory + name
        return os.path.realpath(wanted, strict=True) == os.path.realpath(full, strict=True)
    except (OptionError, OSError):
        return False


def option_prefix(top: Node, node: Node) -> str:
    """What stands in front of the options of *node*, which is below *top*, among those of *top*:
    ``"backing.backing."``, say."""
    todo = [("", top)]
    while todo:
        prefix, at = todo.pop()
        if at is node:
            return prefix
        todo += [(f"{prefix}{name}.", child) for name, child in at.children.items()]
    raise ValueError(f"{node.filename} is not below {top.filename}")
