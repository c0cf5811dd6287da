"""What all ranks must have in common: compared before work starts, so that a difference is an error and not a wrong result.

A rank with another learning rate trains other weights, and one with another number of steps waits for ever. Nothing in
a collective notices either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

from trace_dist.utils import dist

T = TypeVar("T")
LONGEST = 80
"""Characters of a value that a message shows."""
MOST_FIELDS = 3
"""Differing fields that a message shows."""


def agree(what: Mapping[str, object]) -> None:
    """Compare values over ranks. Collective.

    Args:
        what: field -> value; its text is compared.

    Raises:
        ValueError: on every rank, when some field differs; it names the field, the ranks and their values.
    """
    if dist.world_size() == 1:
        return
    mine = {name: str(value) for name, value in what.items()}
    digest = hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest()
    if len(set(dist.gather_objects(digest))) == 1:
        return
    everyone = dist.gather_objects(mine)
    names = list(dict.fromkeys(name for values in everyone for name in values))
    differing = [name for name in names if len({values.get(name) for values in everyone}) > 1]
    shown = "; ".join(
        f"{name}: {_who_has_what([values.get(name) for values in everyone])}"
        for name in differing[:MOST_FIELDS]
    )
    more = f" (and {len(differing) - MOST_FIELDS} fields more)" if len(differing) > MOST_FIELDS else ""
    raise ValueError(
        f"{shown}{more}: the ranks differ; start every rank with the same command, configuration, code and data"
    )


def _who_has_what(values: list[str | None]) -> str:
    """``rank 0 has a, ranks 1-3 have b``."""
    holders: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    parts = []
    for value, ranks in holders.items():
        text = "nothing" if value is None else value
        text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
        parts.append(
            f"rank{'s' * (len(ranks) > 1)} {_spans(ranks)} {'have' if len(ranks) > 1 else 'has'} {text}"
        )
    return ", ".join(parts)


def _spans(ranks: list[int]) -> str:
    """Rising numbers in short: 0, 2-5."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
