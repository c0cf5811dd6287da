"""What the bank's rejection (bank/rejection.py) does to answers."""

from __future__ import annotations

from collections.abc import Sequence

from serving.small import CAP, Small

from trace_dist import Router
from trace_dist.bank.bank import BASE
from trace_dist.serving.options import Sampling


def flags(router: Router, asked: Sequence[str]) -> list[tuple[str, bool]]:
    answers = router.ask(asked, sampling=Sampling(max_new_tokens=CAP))
    return [(answer.task, answer.rejected) for answer in answers]


def test_the_router_sends_what_it_does_not_know_to_the_base(small: Small) -> None:
    strange = "%%%%%%%%%%%%%%%% ~~~~"
    assert flags(Router.open(small.bank, small.base), [strange])[0][1] is False
    router = Router.open(small.bank, small.base, reject=0.1)
    assert flags(router, [strange]) == [(BASE, True)]
    (answer,) = router.ask([strange], sampling=Sampling(max_new_tokens=CAP))
    assert answer.text == small.expected(BASE, [strange])[0]
    # A task that is named is not retrieved.
    (answer,) = router.ask([strange], ["copy"], Sampling(max_new_tokens=CAP))
    assert (answer.task, answer.rejected) == ("copy", False)
