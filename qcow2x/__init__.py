"""qcow2 disk images at the speed of raw files, safely, in your own process.

    import qcow2x

    qcow2x.create("disk.qcow2", 10 << 30)
    with qcow2x.open("disk.qcow2", "r+") as image:
        image.pwrite(b"hello", 0)
        image.flush()

The names below are the whole public surface; everything is imported on first use, so a program
pays for what it calls.
"""

from __future__ import annotations

from qcow2x._version import __version__ as __version__

# The constant of typing, as type checkers know it by its name: the module itself takes half of what
# this import would cost.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from qcow2x._include import get_include as get_include
    from qcow2x.bitmap import Bitmap as Bitmap
    from qcow2x.bitmap import BitmapExtent as BitmapExtent
    from qcow2x.encryption import Encryption as Encryption
    from qcow2x.errors import (
        Cancelled as Cancelled,
    )
    from qcow2x.errors import (
        CorruptImage as CorruptImage,
    )
    from qcow2x.errors import (
        FormatError as FormatError,
    )
    from qcow2x.errors import (
        ImageBroken as ImageBroken,
    )
    from qcow2x.errors import (
        ImageLocked as ImageLocked,
    )
    from qcow2x.errors import (
        KeyRequired as KeyRequired,
    )
    from qcow2x.errors import (
        NoSpace as NoSpace,
    )
    from qcow2x.errors import (
        Qcow2Error as Qcow2Error,
    )
    from qcow2x.errors import (
        ReferenceDenied as ReferenceDenied,
    )
    from qcow2x.errors import (
        StorageError as StorageError,
    )
    from qcow2x.errors import (
        UnsupportedFeature as UnsupportedFeature,
    )
    from qcow2x.image import Image as Image
    from qcow2x.image import open as open
    from qcow2x.inspection import (
        Inspection as Inspection,
    )
    from qcow2x.inspection import (
        Inspector as Inspector,
    )
    from qcow2x.inspection import (
        inspect as inspect,
    )
    from qcow2x.ops.amend import amend as amend
    from qcow2x.ops.check import check as check
    from qcow2x.ops.checkpoint import checkpoint as checkpoint
    from qcow2x.ops.checkpoint import settle_checkpoints as settle_checkpoints
    from qcow2x.ops.commit import commit as commit
    from qcow2x.ops.compare import compare as compare
    from qcow2x.ops.convert import convert as convert
    from qcow2x.ops.create import create as create
    from qcow2x.ops.dd import dd as dd
    from qcow2x.ops.measure import measure as measure
    from qcow2x.ops.rebase import rebase as rebase
    from qcow2x.ops.undo import undo_repair as undo_repair
    from qcow2x.storage import FileStorage as FileStorage
    from qcow2x.storage import Storage as Storage
    from qcow2x.types import (
        CheckResult as CheckResult,
    )
    from qcow2x.types import (
        Extent as Extent,
    )
    from qcow2x.types import (
        Finding as Finding,
    )
    from qcow2x.types import (
        ImageInfo as ImageInfo,
    )
    from qcow2x.types import (
        Reference as Reference,
    )
    from qcow2x.types import (
        Stats as Stats,
    )

_HOME = {
    "qcow2x._include": ("get_include",),
    "qcow2x.bitmap": ("Bitmap", "BitmapExtent"),
    "qcow2x.encryption": ("Encryption",),
    "qcow2x.errors": (
        "Cancelled",
        "CorruptImage",
        "FormatError",
        "ImageBroken",
        "ImageLocked",
        "KeyRequired",
        "NoSpace",
        "Qcow2Error",
        "ReferenceDenied",
        "StorageError",
        "UnsupportedFeature",
    ),
    "qcow2x.image": ("Image", "open"),
    "qcow2x.inspection": ("Inspection", "Inspector", "inspect"),
    "qcow2x.ops.amend": ("amend",),
    "qcow2x.ops.check": ("check",),
    "qcow2x.ops.checkpoint": ("checkpoint", "settle_checkpoints"),
    "qcow2x.ops.commit": ("commit",),
    "qcow2x.ops.compare": ("compare",),
    "qcow2x.ops.convert": ("convert",),
    "qcow2x.ops.create": ("create",),
    "qcow2x.ops.dd": ("dd",),
    "qcow2x.ops.measure": ("measure",),
    "qcow2x.ops.rebase": ("rebase",),
    "qcow2x.ops.undo": ("undo_repair",),
    "qcow2x.storage": ("FileStorage", "Storage"),
    "qcow2x.types": ("CheckResult", "Extent", "Finding", "ImageInfo", "Reference", "Stats"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
