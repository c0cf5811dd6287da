"""Two swaps restore every bit, whatever the bits are."""

from __future__ import annotations

import pytest
import torch
from trace_kernels import Runs, delta_swap
from trace_kernels.delta_swap import delta_swap_ref
from trace_kernels.dispatch import Impl

WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def random_bits(numel: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Any bit pattern: NaN payloads, infinities, -0.0 and subnormals among them."""
    word = WORDS[dtype]
    return torch.randint(-(2**31), 2**31, (numel,)).to(word).to(device).view(dtype)


@pytest.mark.parametrize("dtype", WORDS)
def test_swap_exchanges_and_restores(runs: Runs, impl: Impl, device: str, dtype: torch.dtype) -> None:
    word = WORDS[dtype]
    weight, values = random_bits(runs.numel, dtype, device), random_bits(runs.num_entries, dtype, device)
    start_weight, start_values = weight.clone().view(word), values.clone().view(word)
    swapped_weight, swapped_values = start_weight.clone(), start_values.clone()
    delta_swap_ref(swapped_weight, runs, swapped_values)

    delta_swap(weight, runs, values, impl=impl)
    assert torch.equal(weight.view(word), swapped_weight)
    assert torch.equal(values.view(word), swapped_values)
    delta_swap(weight, runs, values, impl=impl)
    assert torch.equal(weight.view(word), start_weight)
    assert torch.equal(values.view(word), start_values)


def test_refuses_values_of_another_dtype() -> None:
    runs = Runs.clip(torch.arange(4), 2, 0, 8, 8)
    with pytest.raises(ValueError, match="values: dtype"):
        delta_swap(torch.zeros(8, dtype=torch.bfloat16), runs, torch.zeros(8))
