"""Names that become files: of tasks, of general sets."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

MAX_BYTES = 100
"""Longest name in UTF-8; a file name has room for 255 bytes, and endings and temporary names are added."""


def check_names(field: str, names: Sequence[str], reserved: Sequence[str] = ()) -> None:
    """Check that names can be file names, each of its own, on every file system.

    Args:
        field: what holds them, for errors.
        names: the names.
        reserved: names that mean something else.

    Raises:
        ValueError: a name is empty, holds a part of a path or a control character, begins with a dot or a blank, is too
            long or reserved, or differs from another one in case alone.
    """
    taken = {_key(name): "is reserved" for name in reserved}
    for name in names:
        fault = _fault(name) or taken.get(_key(name))
        if fault is not None:
            raise ValueError(f"{field}={name!r}: {fault}; rename it")
        taken[_key(name)] = f"names the same file as {name!r} where case makes no difference"


def _key(name: str) -> str:
    """Equal for names that a file system without case (or with composed accents) takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _fault(name: str) -> str | None:
    size = len(name.encode(errors="surrogatepass"))
    rules = {
        "must not be empty": not name.strip(),
        "must not hold / or \\": bool({"/", "\\"} & set(name)),
        "must not begin with a dot": name.startswith("."),
        "must not begin or end with a blank": name != name.strip(),
        "must not hold a control character or half of a character": any(
            unicodedata.category(character) in ("Cc", "Cs") for character in name
        ),
        f"must be at most {MAX_BYTES} bytes long, it has {size}": size > MAX_BYTES,
    }
    return next((rule for rule, broken in rules.items() if broken), None)
