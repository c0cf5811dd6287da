"""Sorted unit indices in few bytes: how masks lie in memory and deltas on disk.

[Note: gaps] Indices are kept as differences, in words of 1, 2 or 4 bytes, whichever takes least. A difference that reaches the
word's largest value M is written as several words: M as often as it fits, then the rest. So one wide gap (a region that the mask
leaves out) costs a few words, not a wider type for the whole parameter. At 5 % density a single element costs one byte, where
an index costs four and a bit mask two and a half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import expm1, log

import torch
from torch import Tensor

from trace_dist.utils.devices import sent

WORDS = (torch.uint8, torch.int16, torch.int32)
CHUNK = 1 << 20
"""Words decoded at a time; each takes some 25 bytes meanwhile."""


def encode_gaps(units: Tensor) -> Tensor:
    """Sorted unit indices [n] as words of uint8, int16 or int32 ([Note: gaps]), [at least n]."""
    gaps = torch.diff(units.long(), prepend=torch.zeros(1, dtype=torch.int64, device=units.device))
    num_words = {word: len(gaps) + int((gaps // torch.iinfo(word).max).sum()) for word in WORDS}
    word = min(WORDS, key=lambda word: num_words[word] * word.itemsize)
    largest = torch.iinfo(word).max
    encoded = torch.full((num_words[word],), largest, dtype=word, device=units.device)
    encoded[(gaps // largest + 1).cumsum(0) - 1] = (gaps % largest).to(word)
    return encoded


def decode_gaps(words: Tensor, dtype: torch.dtype, num_units: int | None = None) -> Tensor:
    """Inverse of ``encode_gaps``, on the device of the words.

    Args:
        words: from ``encode_gaps``.
        dtype: of the indices, int32 or int64.
        num_units: how many indices there are; given, an accelerator is not waited for.
    """
    if len(words) == num_units:
        return words.cumsum(0, dtype=dtype)
    largest = torch.iinfo(words.dtype).max
    if num_units is None:
        num_units = int((words != largest).sum())
    units = torch.empty(num_units + 1, dtype=dtype, device=words.device)
    index, place = units.new_zeros(()), torch.full((), -1, device=words.device)
    for chunk in words.split(CHUNK):
        ends = chunk != largest
        indices, places = chunk.cumsum(0, dtype=dtype) + index, ends.cumsum(0) + place
        # What is no index goes into the last slot.
        units.scatter_(0, torch.where(ends, places, num_units), indices)
        index, place = indices[-1], places[-1]
    return units[:num_units]


def expected_bytes(num_units: int, of: int) -> int:
    """Bytes in which ``num_units`` random ones of ``of`` units are encoded, on average."""
    if num_units >= of:
        return num_units
    log_skipped = log(1 - num_units / of)  # of the probability that a unit is not selected
    return min(
        round(num_units * word.itemsize / -expm1(torch.iinfo(word).max * log_skipped)) for word in WORDS
    )


@dataclass(frozen=True, eq=False)
class Gaps:
    """One parameter's unit indices, encoded.

    Attributes:
        words: ``encode_gaps`` of them.
        num_units: how many there are.
        dtype: of the indices.
    """

    words: Tensor
    num_units: int
    dtype: torch.dtype

    @classmethod
    def of(cls, units: Tensor) -> Gaps:
        """Encode sorted indices [n], int32 or int64."""
        return cls(encode_gaps(units), len(units), units.dtype)

    def to(self, device: torch.device) -> Gaps:
        """The same on another device."""
        return Gaps(sent(self.words, device), self.num_units, self.dtype)

    def decode(self) -> Tensor:
        """The indices: [num_units]."""
        return decode_gaps(self.words, self.dtype, self.num_units)


class PackedUnits(Mapping[str, Tensor]):
    """Parameter name -> sorted unit indices, decoded at each access.

    Args:
        units: parameter name -> sorted unit indices.
    """

    def __init__(self, units: Mapping[str, Tensor]) -> None:
        self.gaps: dict[str, Gaps]
        if isinstance(units, PackedUnits):
            self.gaps = units.gaps
        else:
            self.gaps = {name: Gaps.of(indices) for name, indices in units.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.gaps[name].decode()

    def __contains__(self, name: object) -> bool:
        return name in self.gaps

    def __iter__(self) -> Iterator[str]:
        return iter(self.gaps)

    def __len__(self) -> int:
        return len(self.gaps)

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded indices."""
        return sum(gaps.words.nbytes for gaps in self.gaps.values())
