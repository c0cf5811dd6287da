"""Rows of one split, from a list of JSON values or from ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from trace_dist.data.pictures import stored_uri

_AT_A_TIME = 1000


@dataclass(frozen=True)
class Table:
    """The rows of one split.

    Attributes:
        where: names the source in errors.
        data: a dataset, or values as they stand in a JSON file.
    """

    where: str
    data: datasets.Dataset | list[Any]

    def __len__(self) -> int:
        return len(self.data)

    @property
    def columns(self) -> list[str]:
        """Names of all columns; of a list, the keys of all its objects, in the order in which they are met.

        Raises:
            ValueError: a value of the list is no object.
        """
        if isinstance(self.data, datasets.Dataset):
            return list(self.data.column_names)
        for i, row in enumerate(self.data):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"{self.where}: example {i} is a {type(row).__name__}, not an object; write {{...}} per example"
                )
        return list(dict.fromkeys(key for row in self.data for key in row))

    def part(self, start: int, stop: int) -> Table:
        """The rows from ``start`` up to ``stop``."""
        if isinstance(self.data, datasets.Dataset):
            return Table(self.where, self.data.select(range(start, stop)))
        return Table(self.where, self.data[start:stop])

    def rows(self, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """All rows with these columns; class labels as their names and short floats with their own digits alone, also in lists
        and objects; images as data URIs (``data.pictures``).

        Raises:
            ValueError: a text is not UTF-8, or an image cannot be read.
        """
        if not isinstance(self.data, datasets.Dataset):
            yield from self.data
            return
        kept = self.data.select_columns([name for name in self.data.column_names if name in columns])
        coded = {name: kind for name, kind in kept.features.items() if _is_coded(kind)}
        images = [name for name, kind in kept.features.items() if isinstance(kind, datasets.Image)]
        for start in range(0, len(kept), _AT_A_TIME):
            for row in self._batch(kept, range(start, min(start + _AT_A_TIME, len(kept)))):
                written = {name: _written(row[name], kind) for name, kind in coded.items()}
                yield row | written | {name: stored_uri(row[name], self.where) for name in images}

    def _batch(self, data: datasets.Dataset, places: range) -> list[dict[str, Any]]:
        for name, kind in data.features.items():
            if isinstance(kind, datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
        try:
            return data.select(places).to_list()
        except UnicodeDecodeError:
            pass
        rows = []
        for i in places:
            try:
                rows.append(data[i])
            # Arrow keeps what it was given: bytes that were called a string are found out here.
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.where}: example {i}: not UTF-8 ({error.reason}); save the dataset again from clean text"
                ) from None
        return rows


def _parts(kind: Any) -> list[Any]:
    """The kinds of what a list or an object holds."""
    if isinstance(kind, Mapping):
        return list(kind.values())
    return [kind.feature] if hasattr(kind, "feature") else []


def _is_coded(kind: Any) -> bool:
    """Whether there are classes or short floats in values of a kind, however deep."""
    short = isinstance(kind, datasets.Value) and kind.dtype in ("float16", "float32")
    return short or isinstance(kind, datasets.ClassLabel) or any(map(_is_coded, _parts(kind)))


def _written(value: Any, kind: Any) -> Any:
    """A value with classes as their names, and short floats with their own digits alone."""
    if value is None or not _is_coded(kind):
        return value
    if isinstance(kind, datasets.ClassLabel):
        # What is none (a hidden label is -1) is refused as no text.
        return kind.names[value] if 0 <= value < len(kind.names) else None
    if isinstance(kind, datasets.Value):
        # 0.1 in fp32 is 0.10000000149011612 as a longer number, and 0.1 wherever it is printed.
        return float(str(np.dtype(kind.dtype).type(value)))
    if isinstance(kind, Mapping):
        return {name: _written(value[name], part) for name, part in kind.items()}
    return [_written(each, kind.feature) for each in value]
