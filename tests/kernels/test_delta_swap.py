"""Two swaps restore every bit, whatever the bits are."""

from __future__ import annotations

import pytest
import torch
from trace_kernels import DeltaSwapBatch, Runs, delta_swap
from trace_kernels.delta_swap import delta_swap_ref
from trace_kernels.dispatch import Impl

WORDS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def random_bits(numel: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Any bit pattern: NaN payloads, infinities, -0.0 and subnormals among them."""
    word = WORDS[dtype]
    return torch.randint(-(2**31), 2**31, (numel,)).to(word).to(device).view(dtype)


@pytest.mark.parametrize("dtype", WORDS)
def test_values_are_written_over_the_entries_alone(
    runs: Runs, impl: Impl, device: str, dtype: torch.dtype
) -> None:
    word = WORDS[dtype]
    # Wherever the slice begins within a cache line.
    whole, values = random_bits(runs.numel + 1, dtype, device), random_bits(runs.num_entries, dtype, device)
    weight, before = whole[1:], values.clone().view(word)
    wanted = weight.clone().view(word)
    wanted[runs.indices()] = before
    batch = DeltaSwapBatch([(weight, runs, values)], impl)
    for _ in range(2):
        batch.write()
        assert torch.equal(weight.view(word), wanted)
        assert torch.equal(values.view(word), before)


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


def check_swapped(
    operands: list[tuple[torch.Tensor, Runs, torch.Tensor]], wanted: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """After a batch has swapped once more, weights and values are those of single swaps, bit for bit."""
    for (weight, runs, values), (other, others) in zip(operands, wanted, strict=True):
        word = WORDS[weight.dtype]
        delta_swap_ref(other.view(word), runs, others.view(word))
        assert torch.equal(weight.view(word), other.view(word))
        assert torch.equal(values.view(word), others.view(word))


def test_many_parameters_are_swapped_at_once(impl: Impl, device: str) -> None:
    """Of several dtypes and masks, an empty one among them; more entries than one tile has."""
    cases = [((4000, 3), "some"), ((5, 7), "some"), ((3, 9000), "some"), ((2, 2), "empty"), ((6, 1), "some")]
    operands, wanted = [], []
    for number, ((rows, cols), density) in enumerate(cases * 2):
        units = torch.arange(0, rows, 2, dtype=torch.int32) if density == "some" else torch.empty(0).int()
        runs = Runs.clip(units, cols, 0, rows * cols, rows * cols)
        dtype = list(WORDS)[number % len(WORDS)]
        weight, values = random_bits(runs.numel, dtype, device), random_bits(runs.num_entries, dtype, device)
        operands.append((weight, runs.to(device), values))
        wanted.append((weight.clone(), values.clone()))
    batch = DeltaSwapBatch(operands, impl)
    for _ in range(3):
        batch.run()
        check_swapped(operands, wanted)


def test_long_and_short_units_lie_beside_each_other(impl: Impl, device: str) -> None:
    """Each parameter's units are of another length, cut at both ends, and there are fewer of some than are fetched ahead."""
    operands, wanted = [], []
    for number, block in enumerate((576, 1, 1536, 64, 3, 100, 5000) * 2):
        numel = 40 * block
        units = torch.arange(number % 3, 40, 3, dtype=torch.int32)
        runs = Runs.clip(units, block, block // 3, numel - block // 2, numel)
        dtype = list(WORDS)[number % len(WORDS)]
        weight, values = random_bits(runs.numel, dtype, device), random_bits(runs.num_entries, dtype, device)
        operands.append((weight, runs.to(device), values))
        wanted.append((weight.clone(), values.clone()))
    batch = DeltaSwapBatch(operands)
    for _ in range(2):
        batch.run()
        check_swapped(operands, wanted)
    batch.write()
    for (weight, runs, values), (other, _) in zip(operands, wanted, strict=True):
        word = WORDS[weight.dtype]
        other.view(word)[runs.indices()] = values.view(word)
        assert torch.equal(weight.view(word), other.view(word))


def test_a_batch_refuses_what_a_swap_refuses() -> None:
    runs = Runs.clip(torch.arange(4), 2, 0, 8, 8)
    with pytest.raises(ValueError, match="weight: shape"):
        DeltaSwapBatch([(torch.zeros(9), runs, torch.zeros(8))])
