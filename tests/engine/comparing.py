"""What training of a case must arrive at, on whatever ranks: the reference's weights, and the base's bits outside the mask."""

from __future__ import annotations

import functools

import pytest
import torch
from engine.cases import CASES
from engine.training import Outcome, train_reference

LOSS_TOLERANCE = 2e-6  # relative, fp32
WEIGHT_TOLERANCE = 3e-5  # absolute; a step moves a weight by up to 1e-2, whatever the size of its gradient


@functools.cache
def reference(name: str) -> Outcome:
    return train_reference(CASES[name])


def assert_frozen_bits(name: str, state: dict[str, torch.Tensor]) -> None:
    """Outside the mask not a bit has changed; inside, almost every entry has."""
    case = CASES[name]
    model = case.model()
    mask, changed, inside = case.mask(model), 0, 0
    for parameter, before in model.named_parameters():
        word = torch.int16 if before.dtype == torch.bfloat16 else torch.int32
        differs = state[parameter].view(word) != before.detach().view(word)
        chosen = mask.dense(parameter) if parameter in mask else torch.zeros(before.shape, dtype=torch.bool)
        assert not bool(differs[~chosen].any()), parameter
        changed, inside = changed + int(differs[chosen].sum()), inside + int(chosen.sum())
    assert inside == mask.num_entries
    assert changed > 0.9 * inside


def assert_close(name: str, outcome: Outcome) -> None:
    """In bf16, where losses and sums over ranks round otherwise than the reference's, the curve is only near it."""
    expected = reference(name)
    if CASES[name].dtype == "bfloat16":
        assert outcome.losses == pytest.approx(expected.losses, rel=0.01)
        return
    assert outcome.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert outcome.norms == pytest.approx(expected.norms, rel=1e-5)
    for parameter, value in expected.state.items():
        torch.testing.assert_close(
            outcome.state[parameter], value, rtol=0, atol=WEIGHT_TOLERANCE, msg=parameter
        )
