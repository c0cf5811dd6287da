"""JSON that people bring: text in UTF-8, with or without a byte-order mark. What is wrong is named with its place."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """A text file, without a byte-order mark.

    Raises:
        ValueError: it cannot be read, or is not UTF-8; names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); fix its permissions") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise ValueError(
            f"{path}:1: this is UTF-16 or UTF-32, not UTF-8; save the file as UTF-8 (for example with iconv)"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8, perhaps Latin-1 or Windows-1252; "
            "save the file as UTF-8 (for example with iconv)"
        ) from None


def check_characters(text: str, where: str) -> str:
    """The text itself.

    Raises:
        ValueError: JSON gave it half of a character, which no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: {text[:80]!r} holds half of a character (a lone surrogate), which is no text; "
            "write the whole character or leave it out"
        ) from None
    return text


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file with one JSON value per line; empty lines are skipped.

    Raises:
        ValueError: as ``read_text``, or a line is not JSON.
    """
    return [value for _, value in numbered_json_lines(path)]


def numbered_json_lines(path: Path) -> list[tuple[int, Any]]:
    """``read_json_lines``, each value with the number of its line, from 1."""
    rows = []
    # Not str.splitlines: JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(io.StringIO(read_text(path), newline=None), start=1):
        # Files that were joined have a byte-order mark where the second one begins.
        text = line.strip().lstrip("\ufeff")
        if text:
            rows.append((number, _parse(text, f"{path}:{number}", "write one object per line")))
    return rows


def read_json_list(path: Path) -> list[Any]:
    """The values of a file that holds one JSON list.

    Raises:
        ValueError: as ``read_text``, or the file is not JSON or not a list.
    """
    rows = _parse(read_text(path), str(path), "restore the file")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds a {type(rows).__name__}, not a list; write a list of examples")
    return rows


def _parse(text: str, where: str, cure: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: brackets are nested too deep; {cure}") from None
    # Not its subclass alone: a number of thousands of digits is a plain ValueError.
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); {cure}") from None
