"""Retrieval among all tasks at once: the bits of looking at one after the other."""

from __future__ import annotations

import pytest
import torch

from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature

DIM = 24


def random_signature(number: int) -> Signature:
    generator = torch.Generator().manual_seed(number)
    num = 1 + number % 3
    counts = torch.randint(1, 9, (num,), generator=generator)
    means, factor, heldout = (torch.randn(rows, DIM, generator=generator) for rows in (num, DIM, 4))
    return Signature(f"task{number}", 3 * means, counts + 1, factor, heldout)


def one_by_one(retriever: Retriever, x: torch.Tensor) -> torch.Tensor:
    white = retriever.gaussian.whiten(x)
    columns = [
        (log_prior - torch.cdist(white, means).square() / 2).amax(dim=1)
        for means, log_prior in zip(retriever.whitened_means(), retriever.log_priors(), strict=True)
    ]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("num_prompts", [1, 25, 26, 300])
def test_all_tasks_at_once(num_prompts: int) -> None:
    retriever = Retriever(map(random_signature, range(40)))
    x = 3 * torch.randn(num_prompts, DIM, generator=torch.Generator().manual_seed(99))
    for number in (40, 41):
        expected, found = one_by_one(retriever, x), retriever.scores(x)
        assert torch.equal(retriever.predict(x), expected.argmax(dim=1))
        # Beyond 25 prompts distances come from a product of matrices, whose rounding depends on its size.
        assert torch.equal(found, expected) or num_prompts > 25
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
        retriever.add(random_signature(number))
