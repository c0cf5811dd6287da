"""Errors of the argument parser in the user's words: the key, its value, and what it may be, not types of Python."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Any

_GIVEN, _GOT = (re.compile(rf"{word} value: (.*)$", re.DOTALL) for word in ("Given", "Got"))
_PART = re.compile(r"\n    - Expected a (?P<kind><class '\w+'>)\. Got value: (?P<value>.*)")
"""An entry of a list that may be something else than a list, too."""
_EXPECTED = re.compile(
    r"Expected a (typing\.Literal\[.*?\]|<class '[\w.]+'>|dot import path string|tuple with \d+ elements)"
)
_CLASS_PATH = re.compile(
    r"Problem with given class_path '(?P<broken>.*?)':\n.*?(?=\n    - |\n  Given|$)"
    r"|Unexpected import path format: (?P<odd>[^\n]*)"
    r"|Import path (?P<other>[^\n]*) does not correspond to a subclass of \w+"
    r"|Not a valid subclass of \w+(?:\. Got value: (?P<value>.*?))?\n  +Subclass types expect.*?(?=\n    - Expected|$)",
    re.DOTALL,
)
"""A section is wanted; the parser takes the value for the path of a class."""
_ENTRY = re.compile(r"\s*Expected a dot import path string: (?P<value>.*)", re.DOTALL)
_REQUIRED = r"the following arguments are required: (?P<keys>.+)"
_SHOWN = 100
"""Characters of an entry that an error shows."""
_KINDS = {
    "bool": "true or false",
    "int": "an int",
    "float": "a float",
    "str": "a text; put it in quotes",
    "NoneType": "null",
    "dict": "a section of keys and values",
    "dot import path string": "a section of keys and values",
}

Options = Callable[[str], Collection[str]]
"""The options of a command."""


def reworded(message: str, options: Options) -> str:
    """An error of the parser in plain words; one that is not known stays as it is.

    Args:
        message: of the parser.
        options: gives the names of the options of a command such as ``bank show``, without dashes; of the parser's own where
            the name is empty.
    """
    for pattern, told in _TOLD:
        found = re.fullmatch(pattern, message, re.DOTALL)
        if found is not None:
            return told(message, found, options)
    return message


def within(entry: Mapping[str, Any], message: str, options: Options) -> str:
    """An error of the parser of a list's entry, and which entry it is."""
    lacking = re.fullmatch(_REQUIRED, message)
    said = f"lacks {lacking['keys']}" if lacking is not None else reworded(message, options)
    shown = ", ".join(f"{key}: {value}" for key, value in entry.items())
    return f"{said}; in {{{shown if len(shown) <= _SHOWN else shown[:_SHOWN] + ' ...'}}}"


def _wrong_value(message: str, found: re.Match[str], _: Options) -> str:
    key, rest = found["key"], _CLASS_PATH.sub(_as_section, found["rest"])
    if (entry := _ENTRY.fullmatch(rest)) is not None:
        given = entry["value"]
        return f"{key}: its entry {'null' if given == 'None' else given} must be {_KINDS['dict']}"
    value, wanted = (
        _GIVEN.search(rest) or _GOT.search(rest),
        [_kind(each) for each in _EXPECTED.findall(rest)],
    )
    if value is None or not wanted:
        return message
    given = value[1].strip()
    if (part := _PART.search(rest)) is not None and "list[" in rest and given.startswith("["):
        return (
            f"{key}={given}: its entry {part['value']} must be {_kind(part['kind'])}{_read_as(part['value'])}"
        )
    wanted = [f"a list; write [{given}]" if kind == "a list" else kind for kind in wanted]
    return f"{key}={given}: must be {' or '.join(dict.fromkeys(wanted))}{_read_as(given) if wanted == [_KINDS['str']] else ''}"


def _as_section(found: re.Match[str]) -> str:
    given = found["broken"] or found["odd"] or found["other"] or found["value"]
    return f"Expected a dot import path string: {given}"


def _read_as(given: str) -> str:
    """Why a text that was written is none."""
    return " (YAML reads yes, no, on and off as true and false)" if given in ("True", "False") else ""


def _no_section(_: str, found: re.Match[str], options: Options) -> str:
    key = found["key"]
    cure = f"; perhaps --{key}.path is meant" if f"{key}.path" in options("") else ""
    return f"{key}={found['value']}: must be {_KINDS['dict']}{cure}"


def _no_value(_: str, found: re.Match[str], __: Options) -> str:
    word = found["word"]
    return f"{word} lacks its value; write {word} VALUE, or {word}=VALUE where that begins with a dash"


def _kind(expected: str) -> str:
    if expected.startswith("typing.Literal["):
        values = expected.removeprefix("typing.Literal[").removesuffix("]")
        return f"one of {values}" if "," in values else values
    name = expected.removeprefix("<class '").removesuffix("'>")
    if name.startswith("tuple"):
        return f"a list of {name.split()[2]} values"
    return _KINDS.get(name, f"a {name}")


def _unknown_key(_: str, found: re.Match[str], options: Options) -> str:
    command = found["name"]
    return (
        f"{command} does not accept {found['key']!r}{_meant(found['key'], options(command))}{_see(command)}"
    )


def _unknown_field(message: str, found: re.Match[str], options: Options) -> str:
    return f"{message}{_meant(found['key'], options(''))}"


def _unknown_word(message: str, found: re.Match[str], options: Options) -> str:
    word = found["word"]
    if word.endswith((".yaml", ".yml")) and "config" in options(""):
        return f"{message}; a configuration is named by --config {word}"
    if not word.startswith("--"):
        return message
    return f"{message}{_meant(word[2:].partition('=')[0], options(''), '--')}"


def _meant(name: str, known: Collection[str], dashes: str = "") -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.8)
    return f"; perhaps {dashes}{close[0]} is meant" if close else ""


def _missing(_: str, found: re.Match[str], options: Options) -> str:
    """The parser calls what is missing by the command and the key."""
    first, *others = found["keys"].split(", ")
    command, name = "", first
    while (known := options(command)) and name not in known and "." in name:
        word, name = name.split(".", 1)
        command = f"{command} {word}".strip()
    keys = [key.removeprefix(first.removesuffix(name)) for key in (first, *others)]
    cure = "; name a configuration by --config" if "config" in known else ""
    return f"{command} lacks {', '.join(f'--{key}' if key in known else key for key in keys)}{cure}{_see(command)}"


def _no_command(_: str, found: re.Match[str], __: Options) -> str:
    command, _, kind = found["key"].rpartition(".")
    command = command.replace(".", " ")
    return f"{command or 'trace-dist'} lacks its {kind}, one of {{{found['some']}}}{_see(command)}"


def _see(command: str) -> str:
    return f"; see {' '.join(['trace-dist', *command.split(), '--help'])}"


_TOLD: tuple[tuple[str, Callable[[str, re.Match[str], Options], str]], ...] = (
    (
        r"""Parser key "(?P<key>[^"]+)":\s+Unable to load config (?P<quote>['"])(?P<value>.*?)(?P=quote)\n.*""",
        _no_section,
    ),
    (r"argument (?P<word>--\S+): expected (?:one|at least one) argument", _no_value),
    (r'Parser key "(?P<key>[^"]+)":(?P<rest>\s.*)', _wrong_value),
    (r"Subcommand '(?P<name>[^']+)' does not accept option '(?P<key>[^']+)'.*", _unknown_key),
    (r"Option '(?P<key>[^']+)' is not accepted.*", _unknown_field),
    (r"unrecognized arguments: (?P<word>\S+).*", _unknown_word),
    (_REQUIRED, _missing),
    (r'expected "(?P<key>[^"]+)" to be one of \{(?P<some>.*)\},.*', _no_command),
)
"""How a message of the parser is known, and what is said instead."""
