"""``--object``: what the block drivers need besides files, which is keys.

``secret,id=ID,data=TEXT`` or ``secret,id=ID,file=PATH``, with ``format=base64`` where the bytes are
written so. A key given as an argument is seen by everybody who lists processes; a file is not. With
``keyid=ID,iv=BASE64`` the bytes are encrypted by AES-256 in CBC mode, with another secret as the key.
"""

from __future__ import annotations

import os

from qcow2x.cli.report import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_KNOWN = {"qom-type", "id", "data", "file", "format", "keyid", "iv"}
_KEY_BYTES, _BLOCK_BYTES = 32, 16


def read_objects(texts: Sequence[str]) -> dict[str, bytes]:
    """The secrets of all ``--object`` arguments, by id. Raises CommandError."""
    secrets: dict[str, bytes] = {}
    for text in texts:
        name, value = _read(text, secrets)
        if name in secrets:
            raise CommandError(
                f"attempt to add duplicate property '{name}' to object (type 'container')"
            )
        secrets[name] = value
    return secrets


def _read(text: str, others: Mapping[str, bytes]) -> tuple[str, bytes]:
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
    unknown = sorted(given.keys() - _KNOWN)
    if unknown:
        raise CommandError(f"Parameter '{unknown[0]}' is unexpected")
    format = given.get("format", "raw")
    if format not in ("raw", "base64"):
        raise CommandError(f"Parameter 'format' does not accept value '{format}'")
    content = _content(given)
    if "keyid" in given:
        key = _key(given, others)
        return given["id"], _decrypted(key, _iv(given), _decoded(content, format))
    return given["id"], _decoded(content, format)


def _key(given: Mapping[str, str], others: Mapping[str, bytes]) -> bytes:
    if given["keyid"] not in others:
        raise CommandError(f"No secret with id '{given['keyid']}'")
    key = others[given["keyid"]]
    if len(key) != _KEY_BYTES:
        raise CommandError(f"Key should be {_KEY_BYTES} bytes in length")
    return key


def _iv(given: Mapping[str, str]) -> bytes:
    if "iv" not in given:
        raise CommandError("IV is required to decrypt secret")
    iv = _decoded(os.fsencode(given["iv"]), "base64")
    if len(iv) != _BLOCK_BYTES:
        raise CommandError(f"IV should be {_BLOCK_BYTES} bytes in length not {len(iv)}")
    return iv


def _decrypted(key: bytes, iv: bytes, content: bytes) -> bytes:
    """Without its padding, whose last byte says how long it is (PKCS 7)."""
    from qcow2x._core.crypto import decrypt_cbc

    if not content or len(content) % _BLOCK_BYTES:
        raise CommandError(f"Length {len(content)} must be a multiple of block size {_BLOCK_BYTES}")
    plain = decrypt_cbc(key, iv, content)
    padding = plain[-1]
    if padding > _BLOCK_BYTES or padding > len(plain):
        raise CommandError(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return plain[: len(plain) - padding]


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
    import base64

    packed = b"".join(content.split())
    try:
        # What comes after the last whole group of four means nothing.
        return base64.b64decode(packed[: len(packed) // 4 * 4], validate=True)
    except ValueError:
        raise CommandError("Base64 data contains invalid characters") from None
