"""The optimizer takes the same steps in a few launches as parameter by parameter; Triton runs, on a GPU or interpreted."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from engine.cases import CASES
from torch import Tensor

from trace_dist import Mask, MaskedAdamW
from trace_dist.optim import masked_adamw
from trace_dist.optim.batches import sum_of_squares
from trace_dist.optim.states import is_quantized

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def trained(granularity: str, num_steps: int, **options: object) -> list[Tensor]:
    """Weights and states after some steps, one parameter without a gradient in the second."""
    case = CASES["bf16"]
    model = case.model().to("cuda" if torch.cuda.is_available() else "cpu")
    mask = Mask.random(model, 0.3, granularity, seed=0, maskable="all")  # type: ignore[arg-type]
    optimizer = MaskedAdamW(model, mask, lr=1e-2, weight_decay=0.1, **options)  # type: ignore[arg-type]
    for step in range(num_steps):
        for number, support in enumerate(optimizer.supports):
            support.reached = not (step == 1 and number == 2)
            generator = torch.Generator().manual_seed(100 * step + number)
            if support.reached:
                support.grad.copy_(torch.randn(len(support.grad), generator=generator))
        optimizer.step()
        optimizer.zero_grad()
    steps = [torch.tensor(state["step"]) for _, state in optimizer.compact()]
    states = [state[key] for _, state in optimizer.compact() for key in sorted(state) if key != "step"]
    return [tensor.detach().float().cpu() for tensor in (*steps, *states, *model.parameters())]


@pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="Triton does not run in this process"
)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"state_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_triton_in_few_launches(
    monkeypatch: pytest.MonkeyPatch, granularity: str, options: dict[str, object]
) -> None:
    shares: list[float] = []
    batch = masked_adamw.Batches.step

    def counted(self: masked_adamw.Batches, entries: list[Any], *rest: Any) -> None:
        batch(self, entries, *rest)
        if entries:
            shares.append(sum(each.num_launches for each in self._kept.values()) / len(entries))

    monkeypatch.setattr(masked_adamw, "can_batch", lambda weight, state: not is_quantized(state))
    monkeypatch.setattr(masked_adamw.Batches, "step", counted)
    together = trained(granularity, 4, **options)
    assert shares[0] < 0.5
    monkeypatch.setattr(masked_adamw, "can_batch", lambda weight, state: False)
    alone = trained(granularity, 4, **options)
    for mine, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sizes", [[], [0], [3, 0, 70_000]])
def test_sum_of_squares(sizes: list[int]) -> None:
    tensors = [torch.randn(size) for size in sizes]
    expected = sum(
        (tensor.double().square().sum() for tensor in tensors), torch.zeros((), dtype=torch.float64)
    )
    found = sum_of_squares(tensors, torch.device("cpu"))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
