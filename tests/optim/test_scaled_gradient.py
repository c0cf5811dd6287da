"""fp16's GradScaler, which looks for overflow at the gradients of a rank's optimizer, and skips steps."""

from __future__ import annotations

import pytest
import torch
from engine.cases import CASES, batches
from torch import Tensor

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.sharding.comm import Comm

CASE = CASES["element"]
IDS = [batch[0] for batch in batches(CASE)]
SCALE = 2.0**10


class OverflowElsewhere(Comm):
    """Another rank's gradients are infinite, as long as ``there``."""

    there = True

    def max(self, tensor: Tensor) -> Tensor:
        return tensor.fill_(1) if self.there and tensor.dtype == torch.float32 else tensor


def test_what_another_rank_finds_skips_the_step_here_and_lowers_the_scale() -> None:
    """Nobody resets the gradients in between, as where DDP is around the model."""
    model, twin = (shard(CASE.model(), "single") for _ in range(2))
    model.comm = comm = OverflowElsewhere()
    mask = Mask.random(model, 0.3, "element", seed=0, maskable="all")
    optimizer, reference = (MaskedAdamW(each, mask, lr=1e-2) for each in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    before = model.full_state_dict()
    for unscaled_first in (True, False):
        scaler.scale(model(input_ids=IDS[0], labels=IDS[0]).loss).backward()
        if unscaled_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == SCALE / 4
    assert all(torch.equal(weight, before[name]) for name, weight in model.full_state_dict().items())
    comm.there = False
    scaler.scale(model(input_ids=IDS[1], labels=IDS[1]).loss).backward()
    scaler.step(optimizer)
    twin(input_ids=IDS[1], labels=IDS[1]).loss.backward()
    reference.step()
    assert optimizer.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
    for name, weight in twin.full_state_dict().items():
        torch.testing.assert_close(model.full_state_dict()[name], weight, rtol=0, atol=1e-5)


def test_to_others_it_is_an_ordinary_gradient() -> None:
    model = shard(CASE.model(), "single")
    optimizer = MaskedAdamW(model, Mask.random(model, 0.3, "element", seed=0))
    for entry, support in zip(optimizer.param_groups[0]["params"], optimizer.supports, strict=True):
        support.grad.fill_(2)
        assert entry.grad.data_ptr() == support.grad.data_ptr()
        assert type(entry.grad * 3) is Tensor
        assert float(torch.nn.utils.get_total_norm([entry.grad])) == pytest.approx(
            2 * len(support.grad) ** 0.5
        )
