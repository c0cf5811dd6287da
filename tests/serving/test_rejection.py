"""Prompts of no known task: the stated rate holds for every task, and what lies far away is seen."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from serving.small import CAP, Small

from trace_dist import Router
from trace_dist.bank.bank import BASE
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature
from trace_dist.serving.options import Sampling
from trace_dist.serving.rejection import Assurance

DIM = 6


def drawn(task: int, num: int, seed: int) -> torch.Tensor:
    """Prompts of a task; those of the last one are spread wider, with heavy tails."""
    generator = torch.Generator().manual_seed(1000 * task + seed)
    x = torch.randn(num, DIM, generator=generator)
    if task == 2:
        x /= torch.rand(num, 1, generator=generator).clamp(min=0.05)
    return x + 40.0 * task


def fitted(task: int, num: int, seed: int) -> Signature:
    """As ``fit_signature`` does it with one cluster, in less time."""
    fit, heldout = drawn(task, num, seed).split([num - num // 4, num // 4])
    mean = fit.mean(dim=0, keepdim=True)
    return Signature(f"task{task}", mean, torch.tensor([len(fit)]), torch.linalg.qr(fit - mean).R, heldout)


def signatures(num: int) -> list[Signature]:
    return [fitted(task, num, 0) for task in range(3)]


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_no_task_has_more_than_its_rate_rejected(rate: float) -> None:
    """Of new prompts, on average over banks; the Gaussian model is wrong for one of the tasks, which does not matter."""
    shares: list[list[float]] = [[], [], []]
    for seed in range(30):
        retriever = Retriever([fitted(task, 200, seed) for task in range(3)])
        assurance = Assurance(retriever, rate)
        for task, found in enumerate(shares):
            new = assurance.rejected(retriever.scores(drawn(task, 400, 500 + seed)))
            found.append(sum(new) / len(new))
    means = [sum(found) / len(found) for found in shares]
    # k / (H + 1) is what split conformal prediction gives where no other task accepts; 30 banks leave a little noise.
    assert all(mean <= 1.35 * rate for mean in means)
    assert max(means) > 0.4 * rate


def test_what_is_far_from_all_tasks_is_rejected() -> None:
    retriever = Retriever(signatures(400))
    far = torch.full((5, DIM), 20.0) + drawn(0, 5, 9)
    scores = retriever.scores(far)
    assert Assurance(retriever, 0.01).rejected(scores) == [True] * 5
    assert Assurance(retriever, None).rejected(scores) == [False] * 5


def test_a_task_with_few_prompts_rejects_nothing_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("trace_dist").propagate = True
    retriever = Retriever([*signatures(400), fitted(3, 20, 0)])
    assurance = Assurance(retriever, 0.01)
    near_few, between = torch.full((1, DIM), 400.0), torch.full((1, DIM), 20.0)
    assert assurance.rejected(retriever.scores(near_few)) == [False]
    assert assurance.rejected(retriever.scores(between)) == [True]
    assert "needs 99 held-out prompts of a task; task3 kept fewer" in caplog.text


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
