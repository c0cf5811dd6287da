"""Training on a teacher's probabilities, beside torch's autograd in float64."""

from __future__ import annotations

import datasets
import pytest
import torch
from torch import Tensor

from trace_dist.data.encoding import IGNORE
from trace_dist.train import cross_entropy
from trace_dist.train.cross_entropy import nll_sum_
from trace_dist.train.soft import SOFT_IDS, SOFT_PROBABILITIES, SoftBatches, soft_nll_sum_

ROWS, VOCABULARY = 7, 13


def targets() -> Tensor:
    """Which rows have a loss; what else they say is not read."""
    return torch.tensor([4, IGNORE, 0, 12, IGNORE, IGNORE, 4])


def taught(k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A teacher's k likeliest tokens for each row with a loss."""
    said = torch.randn(4, VOCABULARY, dtype=dtype, generator=torch.Generator().manual_seed(1)).softmax(1)
    found = said.topk(k)
    return found.indices, found.values


def logits_of(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(2)).mul(3).to(dtype)


def reference(logits: Tensor, ids: Tensor, p: Tensor, scale: float) -> Tensor:
    """The cross-entropy of k + 1 outcomes as one would write it down."""
    q = logits[targets() != IGNORE].softmax(1)
    ours = q.gather(1, ids)
    total = -(p * ours.log()).sum()
    if ids.shape[1] < VOCABULARY:
        total = total - ((1 - p.sum(1)) * (1 - ours.sum(1)).log()).sum()
    return scale * total


@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
@pytest.mark.parametrize("chunk", [1, 2 * VOCABULARY, 10**6])
def test_loss_and_gradient_are_autograds(k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", chunk)
    ids, p = taught(k)
    leaf = logits_of().requires_grad_()
    loss = soft_nll_sum_(leaf * 1, targets(), ids, p, 0.3)
    loss.backward()
    other = logits_of().requires_grad_()
    expected = reference(other, ids, p, 0.3)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-12)
    assert leaf.grad is not None
    assert not leaf.grad[targets() == IGNORE].any()


def test_a_teacher_that_is_certain_is_a_label() -> None:
    labels = targets()
    ids = labels[labels != IGNORE][:, None]
    leaf, other = logits_of().requires_grad_(), logits_of().requires_grad_()
    loss = soft_nll_sum_(leaf * 1, labels, ids, torch.ones_like(ids, dtype=torch.float64), 0.3)
    expected = nll_sum_(other * 1, labels, 0.3)
    (2 * loss).backward()
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_with_the_whole_vocabulary_the_gradient_is_the_difference_of_probabilities() -> None:
    ids, p = taught(VOCABULARY)
    leaf = logits_of().requires_grad_()
    soft_nll_sum_(leaf * 1, targets(), ids, p).backward()
    q = logits_of()[targets() != IGNORE].softmax(1)
    teacher = torch.zeros_like(q).scatter_(1, ids, p)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[targets() != IGNORE], q - teacher, rtol=1e-9, atol=1e-12)


def test_a_model_that_is_sure_of_another_token_still_has_a_finite_loss() -> None:
    logits = torch.full((ROWS, VOCABULARY), -1e4).requires_grad_()
    sure = logits + torch.eye(VOCABULARY)[5] * 2e4
    ids, p = taught(3, torch.float32)
    loss = soft_nll_sum_(sure, targets(), ids, p)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_half_precision_is_reduced_in_fp32() -> None:
    ids, p = taught(3, torch.float32)
    leaf = logits_of(torch.bfloat16).requires_grad_()
    loss = soft_nll_sum_(leaf * 1, targets(), ids, p)
    loss.backward()
    other = logits_of(torch.bfloat16).double().requires_grad_()
    expected = reference(other, ids, p.double(), 1.0)
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-2, atol=1e-3)


def test_without_a_gradient_the_logits_stay() -> None:
    ids, p = taught(3)
    logits = logits_of()
    soft_nll_sum_(logits, targets(), ids, p)
    assert torch.equal(logits, logits_of())


def test_a_filler_has_a_loss_of_zero_with_a_gradient() -> None:
    leaf = logits_of().requires_grad_()
    none = torch.full((ROWS,), IGNORE)
    loss = soft_nll_sum_(leaf * 1, none, torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1))
    loss.backward()
    assert loss.item() == 0
    assert leaf.grad is not None
    assert not leaf.grad.any()


def rows(*answers: int) -> datasets.Dataset:
    """Examples whose answers have these lengths; what is said of a token is its id, and half of it."""
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": [1, 2, *range(10, 10 + n)],
                "labels": [IGNORE, IGNORE, *range(10, 10 + n)],
                "num_answer_tokens": n,
                SOFT_IDS: [[token, token + 1] for token in range(10, 10 + n)],
                SOFT_PROBABILITIES: [[token / 100, 0.0] for token in range(10, 10 + n)],
            }
            for n in answers
        ]
    )


def stream(batch: int, rank: int, world_size: int) -> SoftBatches:
    """Batches of four, replayed examples among them, ``batch`` at a time."""
    return SoftBatches(
        rows(1, 3, 2),
        batch_size=4,
        micro_batch_size=batch,
        seed=0,
        pad_id=0,
        replay=[(rows(5, 4), 1.0)],
        replay_share=0.5,
        rank=rank,
        world_size=world_size,
    )


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_what_was_said_goes_with_its_tokens(world_size: int) -> None:
    """In the order of the labels, rows of other lengths and replayed ones among them; fillers have none."""
    seen = 0
    for rank in range(world_size):
        for batch in next(stream(2, rank, world_size)).micro_batches:
            labels = batch["labels"][batch["labels"] != IGNORE]
            assert batch[SOFT_IDS].dtype == torch.int64
            assert batch[SOFT_PROBABILITIES].dtype == torch.float32
            assert torch.equal(batch[SOFT_IDS][:, :1].flatten(), labels)
            torch.testing.assert_close(batch[SOFT_PROBABILITIES][:, 0], labels / 100)
            assert batch[SOFT_IDS].shape == batch[SOFT_PROBABILITIES].shape
            seen += len(labels)
    assert seen == next(stream(4, 0, 1)).num_answer_tokens
