"""Work that one rank does for all, or that every rank does alike: a failure on one rank is an error on all, never a hang."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from trace_dist.utils import dist

T = TypeVar("T")


def on_main(work: Callable[[], T]) -> T:
    """Rank 0's result of ``work``, on every rank. Collective.

    Raises:
        ValueError: the work failed on rank 0 (which itself raises what the work raised).
    """
    if dist.world_size() == 1:
        return work()
    result: T | None = None
    failure: Exception | None = None
    if dist.is_main():
        try:
            result = work()
        except Exception as error:
            failure = error
    result, problem = dist.broadcast_object((result, None if failure is None else str(failure)))
    _raise(failure, problem)
    return result  # type: ignore[return-value]  # no problem: rank 0 has a result


def on_all(work: Callable[[], T]) -> T:
    """This rank's result of ``work``, once it has succeeded on every rank. Collective.

    Raises:
        ValueError: the work failed on some rank.
    """
    if dist.world_size() == 1:
        return work()
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    problems = dist.gather_objects(None if failure is None else str(failure))
    _raise(failure, next((problem for problem in problems if problem is not None), None))
    return result  # type: ignore[return-value]


def _raise(failure: Exception | None, problem: str | None) -> None:
    """The failure of this rank as it is, that of another one by its message."""
    if failure is not None:
        raise failure
    if problem is not None:
        raise ValueError(problem)
