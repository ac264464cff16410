"""Options on a command line, found as GNU's getopt_long finds them.

Python's own getopt differs where it shows: it has other messages, and reads on behind the first
argument only on request.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class OptionError(Exception):
    """An option is wrong. The text is glibc's, without the program's name in front.

    ``argument`` is the word of the command line in which it stands; ``missing`` tells that nothing
    is wrong with it but that its argument lacks.
    """

    def __init__(self, text: str, argument: str, *, missing: bool = False) -> None:
        super().__init__(text)
        self.argument = argument
        self.missing = missing


def getopt_long(
    argv: Sequence[str], shorts: str, longs: Sequence[str] = (), *, permute: bool = True
) -> tuple[list[tuple[str, str]], list[str]]:
    """The options of *argv*, each with its name (``-f``, ``--force``) and argument, and the rest.

    *shorts* has getopt's form (``hf:``: -h is a flag, -f takes an argument), *longs* are names
    without dashes, with ``=`` behind those that take an argument. A long name may be cut short as
    long as one name only begins like that. With *permute* options may stand behind other
    arguments; without, the first of those ends them, as ``--`` always does. Raises OptionError.
    """
    found: list[tuple[str, str]] = []
    rest: list[str] = []
    words = list(argv)
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            rest += words[at:]
            break
        if not word.startswith("-") or word == "-":
            rest.append(word)
            if not permute:
                rest += words[at:]
                break
            continue
        if word.startswith("--"):
            name, takes, value = _long(word, longs)
            if takes and value is None:
                if at == len(words):
                    raise OptionError(f"option '--{name}' requires an argument", word, missing=True)
                value = words[at]
                at += 1
            found.append((f"--{name}", value or ""))
            continue
        for place, letter in enumerate(word[1:], 1):
            index = -1 if letter in ":;" else shorts.find(letter)
            if index < 0:
                raise OptionError(f"invalid option -- '{letter}'", word)
            if shorts[index + 1 : index + 2] != ":":
                found.append((f"-{letter}", ""))
                continue
            value = word[place + 1 :]
            if not value:
                if at == len(words):
                    raise OptionError(
                        f"option requires an argument -- '{letter}'", word, missing=True
                    )
                value = words[at]
                at += 1
            found.append((f"-{letter}", value))
            break
    return found, rest


def _long(word: str, longs: Sequence[str]) -> tuple[str, bool, str | None]:
    """The full name of a long option, whether it takes an argument, and the one behind ``=``."""
    given, equals, value = word[2:].partition("=")
    known = {one.rstrip("="): one.endswith("=") for one in longs}
    matches = [given] if given in known else [name for name in known if name.startswith(given)]
    if not matches:
        raise OptionError(f"unrecognized option '--{given}'", word)
    if len(matches) > 1:
        possible = "".join(f" '--{name}'" for name in matches)
        raise OptionError(f"option '--{given}' is ambiguous; possibilities:{possible}", word)
    name = matches[0]
    if equals and not known[name]:
        raise OptionError(f"option '--{name}' doesn't allow an argument", word)
    return name, known[name], value if equals else None
