"""How a name or a set of options becomes a graph of nodes, the way QEMU builds one."""

from __future__ import annotations

from qcow2x.backing import Chain
from qcow2x.drivers import naming
from qcow2x.drivers import options as opts
from qcow2x.drivers.errors import OpenError, OptionError
from qcow2x.drivers.node import Node
from qcow2x.drivers.options import Options
from qcow2x.drivers.probe import probe
from qcow2x.drivers.registry import find_driver, find_protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from qcow2x.drivers.blkdebug_rules import Rules

#: cache= of the tools -> (cache.direct, cache.no-flush, writes are durable at return).
CACHE_FLAGS = {
    "writeback": (False, False, False),
    "none": (True, False, False),
    "off": (True, False, False),
    "writethrough": (False, False, True),
    "directsync": (True, False, True),
    "unsafe": (False, True, False),
}

_DETECT_ZEROES = ("off", "on", "unmap")
_DISCARD = {"unmap": True, "on": True, "ignore": False, "off": False}


def open_node(
    target: str | Mapping[str, Any],
    *,
    format: str | None = None,
    image_opts: bool = False,
    writable: bool = False,
    cache: str = "writeback",
    force_share: bool = False,
    backing: bool = True,
    secrets: Mapping[str, bytes] | None = None,
    discard: bool = True,
    detect_zeroes: str = "off",
    copy_on_read: bool = False,
    auto_read_only: bool = False,
    aio: str = "threads",
    rules: Mapping[str, list[Rules]] | None = None,
    io: bool = True,
    checking: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Node:
    """Opens a disk under any block driver there is, with everything below it.

    ``target`` is a file name as QEMU takes it (a path, ``json:{...}``, ``file:...``, another
    driver's protocol), with ``image_opts`` an option string (``driver=qcow2,file.filename=...``),
    or a mapping of options, nested or flat. ``options`` are options besides; where both say
    something, these win. ``format`` is the driver on top; None looks at the first bytes.

    Names found inside images are followed, as QEMU's tools do it, and a backing file that the image
    gives no format for is probed. That is right for a command line whose user knows the image; for
    images from elsewhere use :func:`qcow2x.open`, which refuses both unless told otherwise.

    ``cache``: a mode of :data:`CACHE_FLAGS`. ``force_share`` opens what another program is writing
    (read-only). ``backing=False`` leaves backing files closed: reading what would come from one
    raises. ``secrets`` are the keys that ``key-secret`` options name. ``discard``, ``detect_zeroes``
    (``off``, ``on``, ``unmap``) and ``copy_on_read`` concern the top node. With ``auto_read_only`` a
    file that may not be written is opened read-only instead. ``io=False`` only looks: formats
    need no key, and nothing can be read or written through them. ``checking`` lets in what a check
    can tell something of. ``aio`` is how files are asked to do
    their I/O where their own options do not say; ``native`` needs a cache mode without the host's
    cache, and none makes a difference besides. ``rules`` are those of blkdebug nodes that were open
    before, by :attr:`qcow2x.drivers.blkdebug.BlkdebugNode.rules_key`: they go on where they stand.

    Raises OptionError, OpenError (with the cause in it), and what the library raises: OSError,
    ImageLocked, FormatError, CorruptImage, KeyRequired. Nothing stays open after a failure.
    """
    given = opts.flatten(options or {})
    filename: str | None = None
    if not isinstance(target, str):
        given = {**opts.flatten(target), **given}
    elif image_opts:
        given = {**opts.parse_option_string(target), **given}
    else:
        filename = target
    if format is not None:
        given["driver"] = format
    if force_share:
        given["force-share"] = True
    if cache not in CACHE_FLAGS:
        raise OptionError(f"Invalid cache option: {cache}")
    if detect_zeroes != "off":
        given.setdefault("detect-zeroes", detect_zeroes)
    direct, no_flush, durable = CACHE_FLAGS[cache]
    defaults: Options = {
        "cache.direct": direct,
        "cache.no-flush": no_flush,
        "read-only": not writable,
        "auto-read-only": auto_read_only,
        "discard": "unmap" if discard else "ignore",
    }
    graph = Graph(
        secrets or {},
        io=io,
        checking=checking,
        backing=backing,
        durable=durable,
        aio=aio,
        rules=rules or {},
    )
    node = graph.open(filename, given, defaults, probing=True)
    if copy_on_read and not node.writable:
        node.close()
        raise OptionError("Can't use copy-on-read on read-only device")
    node.copy_on_read = copy_on_read
    return node


class Graph:
    """One call of open_node(): what its nodes have in common."""

    def __init__(
        self,
        secrets: Mapping[str, bytes],
        *,
        io: bool,
        checking: bool,
        backing: bool,
        durable: bool,
        aio: str,
        rules: Mapping[str, list[Rules]],
    ) -> None:
        self.secrets = secrets
        self.io = io
        self.checking = checking
        self.backing = backing
        self.durable = durable
        self.aio = aio
        self.rules = rules

    # ---- What options in force come down to ----

    def is_direct(self, options: Options) -> bool:
        return opts.as_bool("cache.direct", options.get("cache.direct", False))

    def cache_mode(self, options: Options) -> str:
        """The mode for a storage at the bottom; one of :data:`qcow2x.storage.CACHE_MODES`."""
        direct = self.is_direct(options)
        if opts.as_bool("cache.no-flush", options.get("cache.no-flush", False)) and not direct:
            return "unsafe"
        if self.durable:
            return "directsync" if direct else "writethrough"
        return "none" if direct else "writeback"

    def shares(self, options: Options) -> bool:
        return opts.as_bool("force-share", options.get("force-share", False))

    def auto_read_only(self, options: Options) -> bool:
        return opts.as_bool("auto-read-only", options.get("auto-read-only", False))

    def secret(self, name: str) -> bytes:
        if name not in self.secrets:
            raise OptionError(f"No secret with id '{name}'")
        return self.secrets[name]

    # ---- Opening ----

    def open(
        self, filename: str | None, given: Options, defaults: Options, *, probing: bool
    ) -> Node:
        """The node for a name or options, with all below it. ``probing``: a format may stand on top
        of what the name leads to; else it is a protocol that is wanted."""
        # The backing chain is opened from the top down and completed from the bottom up, in a loop:
        # a chain of a thousand must not need thousands of Python frames.
        chain: list[_Layer] = []
        under: Node | None = None
        above = 0
        try:
            wanted: tuple[str | None, Options, Options] | None = (filename, given, defaults)
            seen = Chain()
            while wanted is not None:
                above = len(chain)
                layer = self._open_layer(*wanted, probing)
                chain.append(layer)
                if layer.node.supports_backing:
                    seen.enter(layer.node.children["file"].storage)
                wanted = self._backing_of(layer) if self.backing else None
                probing = True
            while chain:
                above = len(chain) - 1
                self._finish(chain[-1], under)
                under = chain.pop().node
            assert under is not None
            return under
        except BaseException as exc:
            for layer in reversed(chain):
                close_quietly(layer.node)
            if under is not None:
                close_quietly(under)
            if not isinstance(exc, Exception):
                raise
            raise _blamed(exc, above)  # noqa: B904 - each says what its cause is

    def open_child(
        self,
        parent: Node,
        name: str,
        left: Options,
        filename: str | None = None,
        *,
        probing: bool = False,
        optional: bool = False,
    ) -> Node | None:
        """Opens the child ``name`` of a node from the options that are its, removed from ``left``,
        or from a file name. Raises OptionError where there is neither, unless it is optional."""
        given = opts.take_below(left, name)
        reference = left.pop(name, None)
        if reference is not None:
            raise OptionError(f"Cannot find device='{reference}' nor node-name='{reference}'")
        if filename is None and not given:
            if optional:
                return None
            raise OptionError(f'A block device must be specified for "{name}"')
        child = self.open(filename, given, inherited(parent.options), probing=probing)
        parent.children[name] = child
        return child

    def _open_layer(
        self, filename: str | None, given: Options, defaults: Options, probing: bool
    ) -> _Layer:
        """One node with its children but for the backing one."""
        if filename is not None and filename.startswith("json:"):
            # What was said outright wins against what the name says.
            given = {**opts.parse_json_name(filename), **given}
            filename = None
        options = {**defaults, **given}
        driver, filename = _choose(options, filename, probing)
        no_backing = options.get("backing", "-") in (None, "")
        if no_backing:
            del options["backing"]
        left = dict(options)
        file: Node | None = None
        if driver is None or not driver.is_protocol:
            holder = _Holder(self, options)
            file = self.open_child(holder, "file", left, filename, optional=True)
        try:
            probed = driver is None
            if driver is None:
                if file is None:
                    raise OptionError("Must specify either driver or file")
                driver = find_driver(probe(file))
                options["driver"] = driver.driver
            name = options.get("filename") if driver.is_protocol else None
            if driver.needs_filename and not name:
                raise OptionError(f"The '{driver.driver}' block driver requires a file name")
            node = driver(self, options, name)
            node.probed = probed
            node.no_backing = no_backing
            if file is not None:
                node.children["file"] = file
            elif not driver.is_protocol:
                raise OptionError('A block device must be specified for "file"')
        except BaseException:
            if file is not None:
                close_quietly(file)
            raise
        try:
            _take_common(node, left)
            node.open(left)
        except BaseException:
            close_quietly(node)
            raise
        return _Layer(node, left)

    def _backing_of(self, layer: _Layer) -> tuple[str | None, Options, Options] | None:
        """What to open as the backing node of a layer: name, options, defaults."""
        node, left = layer.node, layer.left
        if node.no_backing:
            return None
        reference = left.pop("backing", None)
        if reference is not None:
            raise OptionError(f"Cannot find device='{reference}' nor node-name='{reference}'")
        given = opts.take_below(left, "backing")
        if not node.backing_file and not given:
            return None
        if not node.supports_backing:
            raise OptionError("Driver doesn't support backing files")
        filename = None
        if "file.filename" not in given:
            # Whether it may be written to makes no other backing file of it.
            node.implicit_backing = not given.keys() - {"read-only"}
            filename = node.full_backing_filename
        if node.backing_format is not None:
            given.setdefault("driver", node.backing_format)
        defaults = inherited(node.options)
        defaults.update({"read-only": True, "auto-read-only": False})
        return filename, given, defaults

    def _finish(self, layer: _Layer, backing: Node | None) -> None:
        node, left = layer.node, layer.left
        if backing is not None:
            node.children["backing"] = backing
            if node.implicit_backing:
                node.auto_backing = backing.filename
        if left:
            key = naming.in_qemu_order(list(left))[0]
            if node.is_protocol:
                kind, cannot = "protocol", "doesn't"
            else:
                kind, cannot = "format", "does not"
            raise OptionError(f"Block {kind} '{node.driver}' {cannot} support the option '{key}'")
        for name in node.children:
            node.options.pop(name, None)
            opts.take_below(node.options, name)
        node.complete(backing)


class _Layer:
    def __init__(self, node: Node, left: Options) -> None:
        self.node = node
        #: The options that nobody has asked for yet.
        self.left = left


class _Holder(Node):
    """Stands in for a node whose driver is not known before its file child was looked at."""

    driver = "probing"

    def __init__(self, graph: Graph, options: Options) -> None:
        super().__init__(graph, options, None)


def _choose(
    options: Options, filename: str | None, probing: bool
) -> tuple[type[Node] | None, str | None]:
    """The driver, unless it takes a look at the file to know, and the name that is left for the
    file child; what a name with a protocol says is put into the options."""
    wanted = options.get("driver")
    driver = None if wanted is None else find_driver(opts.as_text(wanted))
    protocol = not probing if driver is None else driver.is_protocol
    if not protocol:
        return driver, filename
    if filename is not None:
        if "filename" in options:
            raise OptionError("Can't specify 'file' and 'filename' options at the same time")
        options["filename"] = filename
    name = options.get("filename")
    if driver is None:
        if name is None:
            raise OptionError("Must specify either driver or file")
        driver = find_protocol(name, filename is not None)
        options["driver"] = driver.driver
    if filename is not None:
        driver.parse_filename(filename, options)
        if not driver.needs_filename:
            options.pop("filename", None)
    return driver, None


def _take_common(node: Node, left: Options) -> None:
    """The options that every driver has."""
    for key in ("driver", "cache.direct", "cache.no-flush", "auto-read-only", "active"):
        value = left.pop(key, None)
        if value is not None and key != "driver":
            opts.as_bool(key, value)
    node.writable = not opts.take_bool(left, "read-only")
    node.node_name = opts.take_text(left, "node-name")
    if opts.take_bool(left, "force-share") and node.writable:
        raise OptionError("force-share=on can only be used with read-only images")
    discard = opts.take_text(left, "discard") or "ignore"
    if discard not in _DISCARD:
        raise OptionError("Invalid discard option")
    node.unmap = _DISCARD[discard]
    node.detect_zeroes = opts.take_text(left, "detect-zeroes") or "off"
    if node.detect_zeroes not in _DETECT_ZEROES:
        raise OptionError(f"invalid parameter value: {node.detect_zeroes}")
    if node.detect_zeroes == "unmap" and not node.unmap:
        raise OptionError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
        )


def inherited(parent: Options) -> Options:
    """What a child has from its parent where its own options say nothing."""
    keys = ("cache.direct", "cache.no-flush", "force-share", "read-only", "auto-read-only")
    found: Options = {key: parent[key] for key in keys if key in parent}
    # Discards are filtered at the top; what gets through may go all the way down.
    found["discard"] = "unmap"
    return found


def close_quietly(node: Node) -> None:
    """Closes what is not going to be used; what went wrong before is what is to be told."""
    try:
        node.close()
    except Exception:
        pass


def _blamed(exc: Exception, layers: int) -> Exception:
    """The error, with what each of so many layers above was doing."""
    for _ in range(layers):
        exc = OpenError("Could not open backing file", exc)
    return exc
