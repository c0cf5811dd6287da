"""Stochastic rounding is unbiased, independent of the sharding, and the same on every path."""

from __future__ import annotations

import torch
from trace_kernels.rounding import stochastic_bf16, stochastic_bf16_ref


def test_equals_the_plain_integer_version() -> None:
    x = torch.cat(
        [torch.randn(300) * 10.0 ** torch.randint(-30, 30, (300,)), torch.tensor([0.0, -0.0, 3e38])]
    )
    indices = torch.randint(0, 2**40, (x.numel(),))
    for seed in (0, 1, -1, 2**63 + 17):
        for upper in (False, True):
            got = stochastic_bf16(x, indices, seed, upper)
            expected = stochastic_bf16_ref(x, indices, seed, upper)
            assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


def test_mean_over_seeds_is_the_value() -> None:
    x = torch.linspace(0.5, 0.5 + 2**-8, 17)[None].repeat(500, 1).view(-1)  # from one bf16 number to the next
    indices = torch.arange(x.numel())
    mean = torch.stack([stochastic_bf16(x, indices, s).double() for s in range(40)]).view(-1, 17).mean(0)
    # one draw has at most half an ulp of deviation; 20,000 draws: 6 sigma
    torch.testing.assert_close(mean, x[:17].double(), rtol=0, atol=6 * 2**-9 / 20_000**0.5)


def test_rounds_to_a_neighbour_and_keeps_what_bf16_holds() -> None:
    x = torch.randn(10_000)
    rounded = stochastic_bf16(x, torch.arange(10_000), 3)
    assert bool(((rounded.float() - x).abs() < x.abs() * 2**-7).all())
    assert torch.equal(stochastic_bf16(rounded.float(), torch.arange(10_000), 4), rounded)


def test_special_values_pass_through() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    rounded = stochastic_bf16(x, torch.arange(5), 0)
    assert torch.equal(rounded[[0, 1]], x[[0, 1]].bfloat16())
    assert bool(rounded[2].isnan())
    assert torch.equal(rounded[3:].view(torch.int16), x[3:].bfloat16().view(torch.int16))


def test_bits_depend_on_the_global_index_and_seed_alone() -> None:
    x, indices = torch.randn(1000), torch.arange(2**33, 2**33 + 1000)
    whole = stochastic_bf16(x, indices, 9)
    parts = [stochastic_bf16(x[a:b], indices[a:b], 9) for a, b in ((0, 333), (333, 1000))]
    assert torch.equal(torch.cat(parts), whole)


def test_seeds_and_indices_decorrelate() -> None:
    """Half way between two bf16 numbers the direction is a fair coin, also between near seeds and indices."""
    x = torch.full((20_000,), 0.5 + 2**-9)
    ups = torch.stack([stochastic_bf16(x, torch.arange(20_000), seed) > 0.5 for seed in range(8)]).double()
    assert bool(((ups.mean(1) - 0.5).abs() < 5 * 0.5 / 20_000**0.5).all())
    correlation = torch.corrcoef(torch.cat([ups[:, :-1], ups[:1, 1:]])) - torch.eye(9)
    assert bool((correlation.abs() < 5 / 20_000**0.5).all())
    high = stochastic_bf16(x, torch.arange(20_000) + 2**32, 0) > 0.5
    other = stochastic_bf16(x, torch.arange(20_000), 0, upper=True) > 0.5
    for each in (high, other):
        assert abs(torch.corrcoef(torch.stack([ups[0], each.double()]))[0, 1]) < 5 / 20_000**0.5
