"""Damage of every kind to a file: bits, cuts, insertions, wrong types in JSON and YAML, sizes and shapes that lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import Any, Literal

import yaml

Kind = Literal["binary", "json", "lines", "tensors", "text", "yaml"]
Sign = Callable[[Any], Any]
"""Gives a changed JSON value the checksums that fit, so that what is behind them is reached."""

DEEP = 300
WRONG: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 3.5, 1e308, float("nan"), float("inf"), -float("inf")),
    *(2**31, 2**40, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(
        "",
        "x",
        "base",
        "../../../outside",
        "/outside",
        "a/b",
        "a\0b",
        "a\nb",
        "\ud800",
        "é",
        "[/x]",
        "x" * 5000,
    ),
    *([], {}, [1], [[]], [None], {"a": 1}, [0] * 500, [-1, 2**40]),
]
"""What may stand where something else should."""
JUNK = (
    b"\0",
    b"\xff\xfe",
    b"\n",
    b"{",
    b"[" * 100_000,
    b"9" * 5000,
    b"'",
    b'"',
    b"*a",
    b"&a [*a]",
    b"\xef\xbb\xbf",
)


def mutated(content: bytes, kind: Kind, chosen: Random, sign: Sign | None = None) -> bytes:
    """A damaged copy.

    Args:
        content: a whole file.
        kind: what is in it.
        chosen: decides the damage.
        sign: of the JSON in it.
    """
    if chosen.random() < 0.3:
        return _bytes(content, chosen)
    ways = {
        "binary": _binary,
        "json": _json,
        "lines": _lines,
        "tensors": _tensors,
        "text": _text,
        "yaml": _yaml,
    }
    return ways[kind](content, chosen, sign)


def _bytes(content: bytes, chosen: Random) -> bytes:
    place = chosen.randrange(len(content) + 1)
    length = min(len(content) - place, chosen.choice((1, 2, 8, 100, 10**6)))
    ways = (
        lambda: _flipped(content, chosen),
        lambda: content[:place],
        lambda: content[place:],
        lambda: content[:place] + chosen.choice(JUNK) + content[place:],
        lambda: content[:place] + content[place + length :],
        lambda: content[:place] + bytes(length) + content[place + length :],
        lambda: content[:place] + content[place : place + length] + content[place:],
        lambda: content[:place] + chosen.randbytes(length % 1000) + content[place + length :],
    )
    return chosen.choice(ways)()


def _flipped(content: bytes, chosen: Random) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(chosen.choice((1, 1, 1, 2, 20))):
        changed[chosen.randrange(len(changed))] ^= 1 << chosen.randrange(8)
    return bytes(changed)


NUMBERS = (0, 1, 2, 12, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def _binary(content: bytes, chosen: Random, sign: Sign | None) -> bytes:
    """A number that lies, of 4 or 8 bytes, near the beginning or the end, where such files have what they say of themselves."""
    size = chosen.choice((4, 8))
    reach = min(len(content), chosen.choice((64, 2048, 2**20)))
    place = chosen.randrange(max(reach - size, 0) + 1)
    if chosen.random() < 0.3:
        place = max(len(content) - size - place, 0)
    number = chosen.choice(NUMBERS) % 2 ** (8 * size)
    return content[:place] + number.to_bytes(size, "little") + content[place + size :]


def _text(content: bytes, chosen: Random, sign: Sign | None) -> bytes:
    """Lines and cells that are gone, doubled, exchanged or of another kind."""
    lines = content.split(b"\n")
    place, other = chosen.randrange(len(lines)), chosen.randrange(len(lines))
    cells = lines[place].split(b",")
    cell = chosen.randrange(len(cells))
    word = str(chosen.choice(WRONG[:30])).encode("utf-8", "surrogatepass")
    ways: tuple[Callable[[], object], ...] = (
        lambda: lines.pop(place),
        lambda: lines.insert(other, lines[place]),
        lambda: lines.__setitem__(slice(None), lines[::-1]),
        lambda: cells.__setitem__(cell, word),
        lambda: cells.pop(cell),
        lambda: cells.insert(cell, chosen.choice((word, b'"', b"\r", b"\0", b'""'))),
    )
    chosen.choice(ways)()
    if place < len(lines):
        lines[place] = b",".join(cells)
    return b"\n".join(lines)


def _json(content: bytes, chosen: Random, sign: Sign | None) -> bytes:
    value = swapped(json.loads(content), chosen)
    if sign is not None and isinstance(value, dict) and chosen.random() < 0.8:
        value = sign(value)
    return _dumped(value)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _lines(content: bytes, chosen: Random, sign: Sign | None) -> bytes:
    lines = content.splitlines()
    place = chosen.randrange(len(lines))
    value = swapped(json.loads(lines[place]), chosen)
    if sign is not None and isinstance(value, dict) and chosen.random() < 0.8:
        value = sign(value)
    lines[place] = _dumped(value)
    return b"\n".join(lines)


def _yaml(content: bytes, chosen: Random, sign: Sign | None) -> bytes:
    if chosen.random() < 0.1:
        return chosen.choice(
            (_bomb(), b"[" * 10**5, b"{a: " * 1000, b"- " * 1000, b"? " * 1000, b"!!python/none x")
        )
    value = swapped(json.loads(_plain(content)), chosen)
    try:
        return yaml.safe_dump(value, allow_unicode=chosen.random() < 0.5).encode("utf-8", "surrogatepass")
    except ValueError:  # more digits than Python writes
        return _bytes(content, chosen)


@cache
def _plain(content: bytes) -> str:
    """YAML as JSON, which is parsed faster."""
    return json.dumps(yaml.safe_load(content))


def _bomb() -> bytes:
    lines = ["k0: &k0 [a, b]", *(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]" for i in range(1, 30))]
    return "\n".join(lines).encode()


def _tensors(content: bytes, chosen: Random, sign: Sign | None) -> bytes:
    """A safetensors file whose header or whose own header within it lies."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    about = header.get("__metadata__", {})
    inner = json.loads(about["header"]) if "header" in about else {}
    if chosen.random() < 0.5:
        inner = swapped(inner, chosen)
    else:
        header = _reshaped(header, chosen)
    if isinstance(header, dict) and chosen.random() < 0.9:
        if sign is not None and isinstance(inner, dict) and chosen.random() < 0.8:
            inner = sign((inner, header, data))
        header["__metadata__"] = {"header": json.dumps(inner)}
    text = json.dumps(header).encode()
    size = len(text) if chosen.random() < 0.95 else chosen.choice((0, 2**20, 2**40, 2**63, len(text) - 1))
    return struct.pack("<Q", size) + text + data


DTYPES = (
    "F32",
    "F64",
    "F16",
    "BF16",
    "I8",
    "I16",
    "I32",
    "I64",
    "U8",
    "U16",
    "U32",
    "U64",
    "BOOL",
    "F8_E4M3",
    "C64",
    "X",
)


def _reshaped(header: dict[str, Any], chosen: Random) -> Any:
    """A tensor of another type or shape, of the same bytes where that can be, or any other change."""
    if chosen.random() < 0.4:
        return swapped(header, chosen)
    entry = header[chosen.choice([name for name in header if name != "__metadata__"])]
    if chosen.random() < 0.5:
        entry["dtype"] = chosen.choice(DTYPES)
    else:
        shape = entry["shape"]
        ways = ([1, *shape], [*shape, 1], shape[::-1], [2**40, 2**40], [0], [], [2, *(n // 2 for n in shape)])
        entry["shape"] = chosen.choice(ways)
    return header


def swapped(value: Any, chosen: Random) -> Any:
    """A JSON value with one part changed: another type or size, a key that is missing or has another name."""
    places = list(_places(value))
    if not places or chosen.random() < 0.02:
        return chosen.choice(WRONG)
    parent, key = chosen.choice(places)
    how = chosen.random()
    if how < 0.55:
        parent[key] = chosen.choice(WRONG)
    elif how < 0.65:
        del parent[key]
    elif how < 0.75 and isinstance(parent, dict):
        parent[chosen.choice(("x", "", "../x", str(key) + "x"))] = parent.pop(key)
    elif how < 0.8:
        parent[key] = _nested(chosen.choice((3, DEEP)))
    else:
        parent[key] = _near(parent[key], chosen)
    return value


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _near(value: Any, chosen: Random) -> Any:
    """A value of the same type, but another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return chosen.choice((value + 1, value - 1, -value, value * 1000, value / 2, str(value)))
    if isinstance(value, str):
        return chosen.choice((value[:-1], value + "x", value.upper(), value[::-1], [value]))
    if isinstance(value, list):
        return chosen.choice((value[:-1], value + value, value[::-1], dict(enumerate(map(str, value)))))
    return [value]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value; long lists by a few of their entries."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = [*range(min(len(value), 3))]
    else:
        return
    for key in keys:
        yield value, key
        yield from _places(value[key])
