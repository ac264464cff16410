"""Options found as glibc's getopt_long finds them."""

from __future__ import annotations

import pytest

from qcow2x.cli.getopt_long import OptionError, getopt_long

LONGS = ("force", "format=", "output=", "object=")


def parse(*words: str, permute: bool = True) -> tuple[list[tuple[str, str]], list[str]]:
    return getopt_long(words, "hqf:", LONGS, permute=permute)


@pytest.mark.parametrize(
    ("words", "options", "rest"),
    [
        (["-q", "x"], [("-q", "")], ["x"]),
        (["x", "-q"], [("-q", "")], ["x"]),
        (["-qfraw", "x"], [("-q", ""), ("-f", "raw")], ["x"]),
        (["-qf", "raw"], [("-q", ""), ("-f", "raw")], []),
        (["-f", "-q"], [("-f", "-q")], []),
        (["--format=raw", "--format", "x"], [("--format", "raw"), ("--format", "x")], []),
        (["--format="], [("--format", "")], []),
        (["--out", "json"], [("--output", "json")], []),
        (["--force"], [("--force", "")], []),
        (["-", "-q", "--", "-q"], [("-q", "")], ["-", "-q"]),
    ],
    ids=str,
)
def test_options(words: list[str], options: list[tuple[str, str]], rest: list[str]) -> None:
    assert parse(*words) == (options, rest)


def test_without_permuting_the_first_argument_ends_options() -> None:
    assert parse("-q", "x", "-q", permute=False) == ([("-q", "")], ["x", "-q"])


@pytest.mark.parametrize(
    ("words", "text", "argument", "missing"),
    [
        (["-z"], "invalid option -- 'z'", "-z", False),
        (["-:"], "invalid option -- ':'", "-:", False),
        (["-qz"], "invalid option -- 'z'", "-qz", False),
        (["-f"], "option requires an argument -- 'f'", "-f", True),
        (["--nope"], "unrecognized option '--nope'", "--nope", False),
        (["--format"], "option '--format' requires an argument", "--format", True),
        (["--force=1"], "option '--force' doesn't allow an argument", "--force=1", False),
        (
            ["--fo"],
            "option '--fo' is ambiguous; possibilities: '--force' '--format'",
            "--fo",
            False,
        ),
    ],
    ids=str,
)
def test_mistakes(words: list[str], text: str, argument: str, missing: bool) -> None:
    with pytest.raises(OptionError) as caught:
        parse(*words)
    assert (str(caught.value), caught.value.argument) == (text, argument)
    assert caught.value.missing is missing
