"""A fault of one rank is every rank's: none goes on alone into a collective that the others never reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from trace_dist.utils import dist

Result = TypeVar("Result")


def agreed(action: Callable[[], Result]) -> Result:
    """What ``action`` returns on this rank. Collective; the action itself must call no collective.

    Raises:
        ValueError: that of the lowest rank whose action raised one, on every rank.
    """
    outcome: list[Result] = []
    fault = None
    try:
        outcome.append(action())
    except ValueError as error:
        fault = error
    for found in dist.gather_objects(fault):
        if found is not None:
            raise found
    return outcome[0]
