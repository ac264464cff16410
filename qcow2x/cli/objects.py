"""``--object``: what the block drivers need besides files, which is keys.

``secret,id=ID,data=TEXT`` or ``secret,id=ID,file=PATH``, with ``format=base64`` where the bytes are
written so. A key given as an argument is seen by everybody who lists processes; a file is not.
"""

from __future__ import annotations

import os

from qcow2x.cli.report import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_KNOWN = {"qom-type", "id", "data", "file", "format"}
_ENCRYPTED = {"keyid", "iv"}


def read_objects(texts: Sequence[str]) -> dict[str, bytes]:
    """The secrets of all ``--object`` arguments, by id. Raises CommandError."""
    secrets: dict[str, bytes] = {}
    for text in texts:
        name, value = _read(text)
        if name in secrets:
            raise CommandError(
                f"attempt to add duplicate property '{name}' to object (type 'container')"
            )
        secrets[name] = value
    return secrets


def _read(text: str) -> tuple[str, bytes]:
    from qcow2x.drivers.errors import OptionError
    from qcow2x.drivers.options import as_text, flatten, parse_json_name, parse_option_string

    try:
        if text.startswith("{"):
            options = parse_json_name("json:" + text)
        else:
            options = parse_option_string(text, "qom-type")
    except OptionError as exc:
        raise CommandError(str(exc)) from None
    given = {key: as_text(value) for key, value in flatten(options).items()}
    kind = given.get("qom-type")
    if kind is None:
        raise CommandError("Parameter 'qom-type' is missing")
    if kind != "secret":
        raise CommandError(f"Parameter 'qom-type' does not accept value '{kind}'")
    if "id" not in given:
        raise CommandError("Parameter 'id' is missing")
    if given.keys() & _ENCRYPTED:
        raise CommandError("Secrets that are encrypted themselves are not supported")
    unknown = sorted(given.keys() - _KNOWN)
    if unknown:
        raise CommandError(f"Parameter '{unknown[0]}' is unexpected")
    return given["id"], _decoded(_content(given), given.get("format", "raw"))


def _content(given: dict[str, str]) -> bytes:
    if "file" in given:
        if "data" in given:
            raise CommandError("'file' and 'data' are mutually exclusive")
        try:
            with open(given["file"], "rb") as file:
                return file.read()
        except OSError as exc:
            why = f"Failed to open file “{given['file']}”: {exc.strerror}"
            raise CommandError(f"Unable to read {given['file']}: {why}") from None
    if "data" not in given:
        raise CommandError("Either 'file' or 'data' must be provided")
    return os.fsencode(given["data"])


def _decoded(content: bytes, format: str) -> bytes:
    if format == "raw":
        return content
    if format != "base64":
        raise CommandError(f"Parameter 'format' does not accept value '{format}'")
    import base64

    try:
        return base64.b64decode(b"".join(content.split()), validate=True)
    except ValueError:
        raise CommandError("Base64 data is not valid") from None
