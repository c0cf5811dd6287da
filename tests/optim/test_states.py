"""Narrow states: bf16 or 8-bit moments, no master copy, states in host memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import CASES, batches
from torch import Tensor

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.checkpoint import load_checkpoint, save_checkpoint
from trace_dist.profiling.states import tensor_bytes

CASE = CASES["bf16"]
IDS = [ids for ids, _ in batches(CASE)]
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16 moments": {"state_dtype": "bfloat16"},
    "8-bit moments": {"state_dtype": "8bit"},
    "no master": {"master": False},
    "8-bit moments, no master": {"state_dtype": "8bit", "master": False},
    "offloaded": {"offload": "cpu"},
    "offloaded, 8-bit, no master": {"offload": "cpu", "state_dtype": "8bit", "master": False},
}
BYTES_PER_ENTRY = {  # master, both moments
    "bf16 moments": 4 + 4,
    "8-bit moments": 4 + 2 * (1 + 4 / 256),
    "no master": 8,
    "8-bit moments, no master": 2 * (1 + 4 / 256),
    "offloaded": 12,
    "offloaded, 8-bit, no master": 2 * (1 + 4 / 256),
}


def make(granularity: str = "element", **options: Any) -> MaskedAdamW:
    model = shard(CASE.model(), "single")
    mask = Mask.random(model, 0.3, granularity, seed=0, maskable="all")
    return MaskedAdamW(
        model, mask, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1, max_grad_norm=1.0, **options
    )


def train(optimizer: MaskedAdamW, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = optimizer.model(input_ids=IDS[0], labels=IDS[step]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(optimizer: MaskedAdamW) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in optimizer.model.module.named_parameters()}


def frozen_are_untouched(optimizer: MaskedAdamW) -> bool:
    start = dict(CASE.model().named_parameters())
    now, mask = weights(optimizer), optimizer.mask
    return all(torch.equal(now[name][~mask.dense(name)], start[name][~mask.dense(name)]) for name in mask)


@pytest.mark.parametrize("option", OPTIONS)
def test_learns_like_full_states_and_freezes_the_rest(option: str) -> None:
    """50 steps that learn one batch: losses stay within 5 % of those with fp32 states, frozen entries bit for bit."""
    wide, narrow = make(), make(**OPTIONS[option])
    steps = range(1)
    expected = [loss for _ in range(50) for loss in train(wide, steps)]
    found = [loss for _ in range(50) for loss in train(narrow, steps)]
    assert expected[-1] < 0.8 * expected[0]
    assert found == pytest.approx(expected, rel=0.05)
    assert frozen_are_untouched(narrow)
    assert (found == expected) == (option == "offloaded")


@pytest.mark.parametrize("option", OPTIONS)
def test_bytes_per_entry(option: str) -> None:
    """Measured on the live tensors; block scales round up once per parameter."""
    optimizer = make(**OPTIONS[option])
    states = optimizer.model_states()
    measured = sum(tensor_bytes(states[kind]) for kind in ("master", "exp_avg", "exp_avg_sq"))
    entries = optimizer.mask.num_entries
    assert measured == pytest.approx(BYTES_PER_ENTRY[option] * entries, abs=2 * 4 * len(optimizer.supports))
    assert tensor_bytes(states["gradients"]) == 4 * entries


def test_an_fp32_weight_is_its_own_master() -> None:
    model = shard(CASES["element"].model(), "single")
    optimizer = MaskedAdamW(model, Mask.random(model, 0.3, "element", seed=0))
    assert optimizer.model_states()["master"] == []


def test_a_thousand_tiny_updates_move_a_bf16_weight_without_a_master() -> None:
    """1000 steps of 1e-5 on a weight of 0.5, spaced 2^-8: stochastic rounding arrives at 0.51 on average."""
    plain = CASE.model()
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        plain.get_parameter(name).fill_(0.5)
    model = shard(plain, "single")
    mask = Mask.random(model, 0.9, "element", seed=0, maskable=name)
    optimizer = MaskedAdamW(model, mask, lr=1e-5, betas=(0, 0), master=False)
    for _ in range(1000):
        optimizer.supports[0].grad.fill_(-1.0)
        optimizer.step()
    moved = plain.get_parameter(name)[mask.dense(name)].float()
    spread = 2**-8 * (2.56 * 1000 / 400) ** 0.5  # generous: each crossing is one step of 2^-8
    assert float(moved.mean()) == pytest.approx(0.51, abs=4 * spread / len(moved) ** 0.5)
    assert len(moved.unique()) > 2


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_second_moment_in_bf16_follows_float64_at_the_usual_betas(factor: float) -> None:
    """500 steps of a gradient of 1 and 500 without one, at every learning rate; to nearest it would stay at the top."""
    model = shard(CASE.model(), "single")
    mask = Mask.random(model, 0.3, "element", seed=0)
    scale = {name: torch.full((len(mask.elements(name)),), factor) for name in mask}
    optimizer = MaskedAdamW(model, mask, lr=0.0, state_dtype="bfloat16", scale=scale)
    second = 0.0
    for step in range(1000):
        grad = float(step < 500)
        second = 0.999 * second + 0.001 * grad**2
        for support in optimizer.supports:
            support.grad.fill_(grad)
            support.reached = True
        optimizer.step()
    found = torch.cat([state["exp_avg_sq"].double() for _, state in optimizer.compact()])
    assert found.mean().item() == pytest.approx(second, rel=0.02)


@pytest.mark.parametrize("option", OPTIONS)
def test_state_dict_and_checkpoint_resume_bit_for_bit(option: str, tmp_path: Path) -> None:
    optimizer = make(**OPTIONS[option])
    train(optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    folder = save_checkpoint(tmp_path, 3, optimizer, {})
    expected = train(optimizer, range(3, 6))
    for restore in ("state_dict", "checkpoint"):
        resumed = make(**OPTIONS[option])
        if restore == "state_dict":
            resumed.load_state_dict(state)
        else:
            load_checkpoint(folder, resumed)
        assert train(resumed, range(3, 6)) == expected
        now, then = weights(resumed), weights(optimizer)
        assert all(torch.equal(now[name], then[name]) for name in now)


@pytest.mark.parametrize(
    ("saved", "loaded"), [("8-bit moments", "bf16 moments"), ("no master", "8-bit moments")]
)
def test_a_checkpoint_loads_into_other_states(saved: str, loaded: str, tmp_path: Path) -> None:
    optimizer, other = make(**OPTIONS[saved]), make(**OPTIONS[loaded])
    train(optimizer, range(3))
    load_checkpoint(save_checkpoint(tmp_path, 3, optimizer, {}), other)
    assert train(other, range(3, 6)) == pytest.approx(train(optimizer, range(3, 6)), rel=1e-2)
    with pytest.raises(ValueError, match="other state options"):
        make(**OPTIONS[loaded]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (
            torch.float32,
            {"state_dtype": "4bit"},
            "state_dtype='4bit': unknown; use one of float32, bfloat16, 8bit",
        ),
        (torch.float32, {"offload": "disk"}, "offload='disk': unknown; use one of none, cpu"),
        (torch.float16, {"master": False}, "master=False: .* is fp16"),
        (torch.float64, {"state_dtype": "8bit"}, "state_dtype='8bit': .* is fp64"),
    ],
)
def test_options_that_cannot_be(dtype: torch.dtype, options: dict[str, Any], message: str) -> None:
    model = shard(CASES["element"].model().to(dtype), "single")
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(model, Mask.random(model, 0.3, "element", seed=0), **options)
