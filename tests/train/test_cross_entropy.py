"""Cross-entropy in chunks against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trace_dist.profiling.activations import _LiveStorages
from trace_dist.train import cross_entropy
from trace_dist.train.cross_entropy import nll_sum_

VOCABULARY = 37


def batch(num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits with large and small values; about a third of the rows has no label."""
    generator = torch.Generator().manual_seed(num_rows)
    logits = (8 * torch.randn(num_rows, VOCABULARY, generator=generator)).to(dtype)
    targets = torch.randint(VOCABULARY, (num_rows,), generator=generator)
    targets[torch.rand(num_rows, generator=generator) < 0.3] = -100
    return logits.requires_grad_(), targets


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
@pytest.mark.parametrize("num_rows", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_torch(
    monkeypatch, dtype: torch.dtype, num_rows: int, rows_at_a_time: int
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": rows_at_a_time * VOCABULARY})
    logits, targets = batch(num_rows, dtype)
    expected_logits = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(expected_logits, targets, ignore_index=-100, reduction="sum") / 5
    expected.backward()
    loss = nll_sum_(logits, targets, 1 / 5)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    assert logits.grad.dtype == dtype
    step = max(torch.finfo(dtype).eps, tolerance)  # one rounding to the dtype of the logits
    torch.testing.assert_close(
        logits.grad.double(), expected_logits.grad, rtol=step, atol=1e-12 if dtype == torch.float64 else 1e-7
    )
    assert not logits.grad[targets == -100].any()


def test_a_batch_without_labels_has_loss_and_gradient_zero() -> None:
    logits, _ = batch(5, torch.float32)
    loss = nll_sum_(logits, torch.full((5,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_no_rows_have_loss_zero() -> None:
    logits = torch.empty(0, VOCABULARY, requires_grad=True)
    loss = nll_sum_(logits, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None


def test_a_later_factor_multiplies_the_gradient() -> None:
    gradients = []
    for scale, factor in ((0.75, 1.0), (0.25, 3.0)):
        logits, targets = batch(9, torch.float64)
        (factor * nll_sum_(logits, targets, scale)).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)


def test_logits_that_need_no_gradient_stay_as_they_are() -> None:
    logits, targets = batch(9, torch.bfloat16)
    before = logits.detach().clone()
    with torch.no_grad():
        nll_sum_(logits, targets)
    nll_sum_(logits.detach(), targets)
    assert torch.equal(logits, before)


def test_logits_that_autograd_still_needs_are_an_error_not_a_wrong_gradient() -> None:
    x = torch.randn(3, VOCABULARY, requires_grad=True)
    # the derivative of tanh is made of its output
    loss = nll_sum_(x.tanh(), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_may_come_through_a_hook_on_their_module() -> None:
    """Which hands on a view that autograd lets nobody change."""
    head = torch.nn.Linear(5, VOCABULARY).double()
    targets = torch.randint(VOCABULARY, (2 * 3,))
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    F.cross_entropy(head(x).flatten(0, 1), targets, reduction="sum").backward()
    assert head.weight.grad is not None
    expected, head.weight.grad = head.weight.grad, None
    head.register_full_backward_hook(lambda *_: None)
    nll_sum_(head(x.requires_grad_()).flatten(0, 1), targets).backward()
    torch.testing.assert_close(head.weight.grad, expected)


def test_nothing_of_the_size_of_the_logits_lives_beside_them(monkeypatch) -> None:
    """Counted on storages: torch's own holds six times the bytes of bf16 logits beside them."""
    logits = torch.zeros(1000, VOCABULARY, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(1000, dtype=torch.int64)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", {"cpu": 10 * VOCABULARY})

    def peak(loss_of) -> int:
        live = _LiveStorages(iter([logits, targets]))
        with live:
            torch.autograd.grad(loss_of(), logits)
        return max(sum(moment.peak.values()) for moment in live.moments)

    size = logits.numel() * logits.element_size()
    rows = 40 * len(logits)  # a few numbers per row
    assert peak(lambda: nll_sum_(logits, targets)) < rows + 4 * 2 * 10 * VOCABULARY < size
    assert peak(lambda: F.cross_entropy(logits.float(), targets, reduction="sum")) >= 6 * size
