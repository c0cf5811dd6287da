"""Work that one rank does for all, or that every rank does alike: a failure on one rank is an error on all, never a hang."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from trace_dist.utils import dist

T = TypeVar("T")


def on_main(work: Callable[[], T]) -> T:
    """Rank 0's result of ``work``, on every rank. Collective.

    Raises:
        ValueError: the work raised one on rank 0.
        RuntimeError: the work raised something else on rank 0, which itself raises that.
    """
    if dist.world_size() == 1:
        return work()
    outcome = _outcome(work) if dist.is_main() else None
    result, problem = dist.broadcast_object(None if outcome is None else (outcome.result, outcome.problem))
    _raise(outcome, problem)
    return result  # type: ignore[no-any-return]


def on_all(work: Callable[[], T]) -> T:
    """This rank's result of ``work``, once it has succeeded on every rank. Collective; the work itself must not be.

    Raises:
        ValueError: the work raised one on some rank.
        RuntimeError: the work raised something else on another rank.
    """
    if dist.world_size() == 1:
        return work()
    outcome = _outcome(work)
    problems = dist.gather_objects(outcome.problem)
    _raise(outcome, next((problem for problem in problems if problem is not None), None))
    return outcome.result  # type: ignore[no-any-return]


def first_once_per_host(work: Callable[[], T]) -> T:
    """As ``on_all``, but the first rank of each host works before the others, which find what it has left in a cache."""
    if dist.world_size() == 1:
        return work()
    hosts = dist.gather_objects(socket.gethostname())
    is_first = hosts.index(hosts[dist.rank()]) == dist.rank()
    result = on_all(lambda: work() if is_first else None)
    return on_all(lambda: result if is_first else work())  # type: ignore[return-value]


class _Outcome(NamedTuple):
    """What came of some work on this rank."""

    result: Any = None
    failure: Exception | None = None

    @property
    def problem(self) -> tuple[type[Exception], str] | None:
        """Kind and message of the failure: other ranks may be unable to read the failure itself."""
        if self.failure is None:
            return None
        kind = type(self.failure)
        # Errors of this package take a message alone, and what catches them must catch them on every rank.
        own = kind.__module__.startswith("trace_dist.") and isinstance(self.failure, ValueError)
        plain = ValueError if isinstance(self.failure, ValueError) else RuntimeError
        return (kind if own else plain), str(self.failure)


def _outcome(work: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(work())
    except Exception as error:
        return _Outcome(failure=error)


def _raise(outcome: _Outcome | None, problem: tuple[type[Exception], str] | None) -> None:
    """This rank's failure as it is, another rank's by its message."""
    if outcome is not None and outcome.failure is not None:
        raise outcome.failure
    if problem is not None:
        kind, message = problem
        raise kind(message)
