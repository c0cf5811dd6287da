"""Whether a GGUF file holds what it says, before libraries that believe it read it.

A count of 2^40 that a damaged file states makes them loop, or build as many layers. Here every count is held against the bytes
that are left, so that a look takes time and memory in proportion to the file. They also put a family's defaults where a fact is
missing, and pass over tensors whose names they do not know: the outcome is another model, without a word. So both are refused.
The layout is that of ``gguf``:

    magic, version, number of tensors, number of facts
    facts: name, type, value          tensors: name, dimensions, type, place
    values of the tensors
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_SIZES = (
    *("block_count", "embedding_length", "feed_forward_length", "expert_feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("expert_count", "expert_used_count", "expert_shared_count", "rope.dimension_count"),
)
"""Facts of an architecture that say how large its tensors are: none is larger than all dimensions of tensors, or their number."""
_NEEDED = ("block_count", "context_length", "embedding_length")
"""Facts without which no architecture is itself."""
_NEEDED_BY_ATTENTION = ("attention.head_count",)
_EPSILON = (
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attention.group_norm_epsilon",
)
_ENDINGS = (".weight", ".bias", ".scale", ".input_scale")
MOST_DIMENSIONS = 8
LEAST_BITS = 1
"""Of a value, in the narrowest format."""
LONGEST_NAME = 2**16


@dataclass
class _Cursor:
    """A place in a file."""

    data: mmap.mmap
    order: str
    at: int = 0

    def left(self) -> int:
        return len(self.data) - self.at

    def number(self, code: str) -> Any:
        form = struct.Struct(self.order + code)
        if self.left() < form.size:
            raise ValueError("it ends in its middle")
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def count(self, of: str, least_bytes: int) -> int:
        """A number of things of which each takes some bytes of the file."""
        value = int(self.number("Q"))
        if value * least_bytes > self.left():
            raise ValueError(f"it says that it has {value} {of}, and there are {self.left()} bytes left")
        return value

    def text(self) -> bytes:
        length = self.count("bytes of a text", 1)
        self.at += length
        return self.data[self.at - length : self.at]


def check_gguf(path: Path) -> None:
    """Look through the head of a GGUF file.

    Raises:
        ValueError: it is none, ends too early, states counts and sizes that do not fit its own bytes or its own tensors, lacks a
            fact, or has a tensor by a name that there is not.
    """
    if path.stat().st_size < 24:
        raise ValueError("it is too short")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        cursor = _Cursor(data, "<", 4)
        if int(cursor.number("I")) & 0xFFFF == 0:
            cursor = _Cursor(data, ">", 8)
        # a name of no letters, a type, a number of dimensions, a place
        tensors = cursor.count("tensors", 24)
        facts = list(_facts(cursor, cursor.count("facts", 13)))
        found = [_tensor(cursor) for _ in range(tensors)]
    fits = max((largest for _, largest in found), default=0)
    for name, value in facts:
        if name.partition(".")[2] in _SIZES and any(number > max(fits, tensors) for number in value):
            raise ValueError(f"{name} is {max(value)}, and none of its {tensors} tensors is so large")
    _check_names([name for name, _ in found], dict(facts))


def _check_names(tensors: list[str], facts: Mapping[str, list[int]]) -> None:
    """Facts and tensors belong together, and each tensor has a name that ``gguf`` gives."""
    from gguf import TENSOR_NAMES

    known = {_pattern(name) for name in TENSOR_NAMES.values()}
    for name in tensors:
        ending = next((each for each in _ENDINGS if name.endswith(each)), "")
        if _pattern(name) not in known and _pattern(name.removesuffix(ending)) not in known:
            raise ValueError(f"it has a tensor {name!r}, and GGUF knows none of that name")
    # Those of what reads images or sounds stand beside them, under a name of their own.
    stated = {
        name.partition(".")[2]: value for name, value in facts.items() if not name.startswith("general.")
    }
    attends = any(".attn_q" in name for name in tensors)
    needed = (*_NEEDED, *(_NEEDED_BY_ATTENTION if attends else ()))
    for name in needed:
        if name not in stated:
            raise ValueError(f"it does not say its {name}")
    families = {name.partition(".")[0] for name in facts if name.partition(".")[2] in needed}
    if len(families) > 1:
        raise ValueError(f"its facts are of several architectures: {', '.join(sorted(families))}")
    if any("_norm" in name for name in tensors) and not any(name in stated for name in _EPSILON):
        raise ValueError(f"it says none of {', '.join(_EPSILON)}")
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    count = stated["block_count"]
    if blocks != set(range(count[0] if count else 0)):
        raise ValueError(f"block_count is {count}, and it has tensors of {len(blocks)} blocks")


def _pattern(name: str) -> str:
    """A name without numbers of blocks and experts."""
    return ".".join("#" if part.isdigit() or part in ("{bid}", "{xid}") else part for part in name.split("."))


def _facts(cursor: _Cursor, count: int) -> Iterator[tuple[str, list[int]]]:
    """Name and integers of each fact; other values are passed over."""
    for _ in range(count):
        name = cursor.text()
        if len(name) > LONGEST_NAME:
            raise ValueError(f"a fact has a name of {len(name)} bytes")
        yield name.decode("utf-8", "replace"), _value(cursor, int(cursor.number("I")))


def _value(cursor: _Cursor, kind: int) -> list[int]:
    if kind == _TEXT:
        cursor.text()
        return []
    if kind != _LIST:
        value = cursor.number(_code(kind))
        return [value] if isinstance(value, int) else []
    of = int(cursor.number("I"))
    if of == _TEXT:
        for _ in range(cursor.count("texts", 8)):
            cursor.text()
        return []
    if of == _LIST:
        raise ValueError("it has a list of lists")
    code = _code(of)
    values = struct.Struct(f"{cursor.order}{cursor.count('numbers', struct.calcsize('<' + code))}{code}")
    found = values.unpack_from(cursor.data, cursor.at)
    cursor.at += values.size
    return [value for value in found if isinstance(value, int)]


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"it has a value of the type {kind}, which there is not")
    return _NUMBERS[kind]


def _tensor(cursor: _Cursor) -> tuple[str, int]:
    """Name and largest dimension of the next tensor."""
    name = cursor.text().decode("utf-8", "replace")
    dimensions = int(cursor.number("I"))
    if dimensions > MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {dimensions} dimensions")
    shape = [int(cursor.number("Q")) for _ in range(dimensions)]
    cursor.number("I"), cursor.number("Q")
    entries = 1
    for size in shape:
        entries *= size
    if entries * LEAST_BITS > 8 * len(cursor.data):
        raise ValueError(f"a tensor has the shape {shape}, and the file has {len(cursor.data)} bytes")
    return name, max(shape, default=0)
