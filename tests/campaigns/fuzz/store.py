"""Images as they are kept: compressed, each in a file named after its content."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

from campaigns import sanitizer

#: In the tree: what shows the most of the core with the least bytes.
CORPUS = Path(__file__).with_name("corpus")
#: What runs on this machine have found: images that led somewhere new, and those that went wrong.
FOUND = sanitizer.SOURCE / "build" / "fuzz"
SUFFIX = ".image.z"


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def corpus() -> dict[str, bytes]:
    """What is kept in the tree, by name."""
    return {
        path.name.removesuffix(SUFFIX): zlib.decompress(path.read_bytes())
        for path in sorted(CORPUS.glob("*" + SUFFIX))
    }


def load(name: str) -> bytes:
    """An image by the name or path that a report gives."""
    path = Path(name)
    if not path.exists():
        path = CORPUS / f"{name}{SUFFIX}"
    data = path.read_bytes()
    return zlib.decompress(data) if path.name.endswith(SUFFIX) else data


def save(folder: Path, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name_of(data)}{SUFFIX}"
    path.write_bytes(zlib.compress(data, 9))
    return path
