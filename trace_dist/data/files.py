"""Text files that people bring, in UTF-8 with or without a byte-order mark, as they are or packed by gzip. What is wrong is named
with its place.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
"""What compressed files begin with."""
_LOOKED_AT, _MOST_ZEROS = 4096, 0.1
"""Bytes that are looked at, and the share of zeros above which they are text in units of two or four bytes."""
GZIP = ".gz"
"""Ends the name of a file that gzip has packed."""
SEPARATORS = (";", "\t", ",", "|")
"""Of cells, in files of people."""


def read_text(path: Path) -> str:
    """A text file, without a byte-order mark.

    Raises:
        ValueError: it cannot be read, is compressed without saying so by its name, or is not UTF-8; names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); fix its permissions") from None
    if path.suffix.lower() == GZIP:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: cannot be unpacked ({error}); pack the file again") from None
    packed = next((kind for begin, kind in _COMPRESSED.items() if content.startswith(begin)), None)
    if packed is not None:
        raise ValueError(f"{path}:1: this is compressed ({packed}), not text; unpack the file")
    begin = content[:_LOOKED_AT]
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")) or begin.count(0) > _MOST_ZEROS * len(begin):
        raise ValueError(
            f"{path}:1: this is UTF-16 or UTF-32, not UTF-8; save the file as UTF-8 (for example with iconv)"
        )
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(0)) + 1
        raise ValueError(
            f"{path}:{line}: a zero byte, which no text holds; perhaps the file was cut or is damaged: write it again"
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
    return _lines(read_text(path), path)


def read_json_values(path: Path) -> list[Any]:
    """The values of a file that holds one JSON list, or one JSON object per line.

    Raises:
        ValueError: as ``read_text``, or the file is neither.
    """
    text = read_text(path)
    first, _, others = text.strip().partition("\n")
    if first.strip().startswith("{") and first.strip().endswith("}") and others:
        return [value for _, value in _lines(text, path)]
    rows = _parse(text, str(path), "restore the file")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds a {type(rows).__name__}, not a list; write a list of examples")
    return rows


def cells_header(path: Path, separator: str) -> list[str]:
    """The header of a file of separated cells, all of whose rows are as long as it is.

    A column without a name, such as the index that pandas writes, has the name that pandas gives it, ``Unnamed: 0``.

    Raises:
        ValueError: as ``read_text``; there is no header or no row, a column is named twice, cells are separated otherwise, a row
            is longer or shorter, or a cell goes on behind its closing quote.
    """
    rows = _cells(path, separator)
    _, header = next(rows, (0, []))
    if not header:
        raise ValueError(f"{path}:1: is empty; write a header and rows of examples")
    header = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
    other = next((each for each in SEPARATORS if len(header) == 1 and each in header[0]), None)
    if other is not None:
        raise ValueError(
            f"{path}:1: the header is the one cell {header[0]!r}; separate cells by {separator!r}, not {other!r}"
        )
    if len(set(header)) < len(header):
        raise ValueError(f"{path}:1: the header is {header}; name each column once")
    line = 0
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{path}:{line}: the row has {len(row)} cells, the header {len(header)}; put texts with {separator!r} "
                "into quotes"
            )
    if not line:
        raise ValueError(f"{path}:1: there is no row below the header; add examples")
    return header


def _cells(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its last line.

    Strictly: of a cell that begins with a quote and goes on behind its second one, readers drop the quotes without a word, and
    one that is never closed swallows the rows behind it.
    """
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=separator, strict=True)
    begun = 1
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
            begun = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}:{begun}: a cell begins with a quote, and does not end with its second one ({error}); put the whole cell "
            'into quotes, and write each quote inside as ""'
        ) from None


def _lines(whole: str, path: Path) -> list[tuple[int, Any]]:
    rows = []
    # Not str.splitlines: JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(io.StringIO(whole, newline=None), start=1):
        # Files that were joined have a byte-order mark where the second one begins.
        text = line.strip().lstrip("\ufeff")
        if text:
            rows.append((number, _parse(text, f"{path}:{number}", "write one object per line")))
    return rows


def _parse(text: str, where: str, cure: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{where}: brackets are nested too deep; {cure}") from None
    # Not its subclass alone: a number of thousands of digits is a plain ValueError.
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); {cure}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that is there twice, JSON does not say which value counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found
