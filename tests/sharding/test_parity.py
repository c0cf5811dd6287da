"""Masked training, on one process and on several ranks of ZeRO-3 and FSDP2, equals dense AdamW with everything else put back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from engine.cases import CASES, batches
from engine.comparing import assert_close, assert_frozen_bits, reference
from engine.training import Outcome, train, train_reference

from trace_dist import shard

FP32 = [name for name, case in CASES.items() if case.dtype == "float32"]


@pytest.mark.parametrize("name", CASES)
def test_single_process(name: str) -> None:
    outcome = train(CASES[name], shard(CASES[name].model(), "single"))
    assert_frozen_bits(name, outcome.state)
    assert_close(name, outcome)


SAME_OPERATIONS = [
    name
    for name, case in CASES.items()
    # not Gemma: its tied embedding sums two gradients in another order
    if case.accumulation == 1
    and case.family not in ("sliver", "gemma3_text")
    and case.granularity != "column"
]


@pytest.mark.parametrize("name", SAME_OPERATIONS)
@pytest.mark.usefixtures("torch_kernels")
def test_single_process_has_the_bits_of_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's cross-entropy, as the reference has; that in chunks rounds otherwise."""
    monkeypatch.setattr("engine.training.answer_nll_sum_", torch_nll_sum)
    outcome = train(CASES[name], shard(CASES[name].model(), "single"))
    assert all(torch.equal(outcome.state[key], value) for key, value in reference(name).state.items())


def torch_nll_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("name", ["element-everything", "row", "qwen2-columns"])
def test_fifty_steps_in_float64(name: str) -> None:
    """Where rounding hides nothing: weight decay, momentum and clipping on, to twelve digits."""
    case = replace(CASES[name], dtype="float64", steps=50)
    outcome, expected = train(case, shard(case.model(), "single")), train_reference(case)
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-12)
    assert outcome.norms == pytest.approx(expected.norms, rel=1e-10)
    start = case.model().state_dict()
    for parameter, value in expected.state.items():
        torch.testing.assert_close(outcome.state[parameter], value, rtol=1e-10, atol=1e-12, msg=parameter)
        frozen = value == start[parameter]  # the reference has put them back
        assert torch.equal(outcome.state[parameter][frozen], start[parameter][frozen]), parameter


def from_ranks(world, num_ranks: int, name: str) -> Outcome:
    report = world(num_ranks).section("parity")[name]
    assert report["mask"] == CASES[name].mask(CASES[name].model()).digest()
    return Outcome(report["losses"], report["norms"], world(num_ranks).state(name))


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", FP32)
def test_zero3(world, num_ranks: int, name: str) -> None:
    outcome = from_ranks(world, num_ranks, name)
    assert_frozen_bits(name, outcome.state)
    assert_close(name, outcome)


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_zero3_in_bf16(world, num_ranks: int) -> None:
    """20 steps. Frozen bits are exact."""
    outcome = from_ranks(world, num_ranks, "bf16")
    assert_frozen_bits("bf16", outcome.state)
    assert_close("bf16", outcome)


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_fsdp2(world, num_ranks: int, name: str) -> None:
    report = world(num_ranks).section("fsdp2")[name]
    outcome = Outcome(report["losses"], report["norms"], world(num_ranks).state(f"fsdp2-{name}"))
    assert_frozen_bits(name, outcome.state)
    assert_close(name, outcome)


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_what_fsdp2_reduces_itself_is_not_exchanged_again(world, num_ranks: int) -> None:
    for report in world(num_ranks).reports:
        assert report["fsdp2"]["hooks alone"] == {"sent": 0, "trained": True}


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_fsdp2_loaded_in_shards(world, num_ranks: int) -> None:
    """A model that each rank read its own rows of trains like one that was whole before."""
    found = [report["fsdp2"] for report in world(num_ranks).reports]
    name = "element-everything"
    assert found[0]["loaded"]["losses"] == found[0][name]["losses"]
    total = sum(parameter.numel() for parameter in CASES[name].model().parameters())
    assert sum(report["loaded"]["share"] for report in found) == total


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_some_experts_get_no_token(num_ranks: int) -> None:
    """What the cases with experts show holds where a rank's tokens use some experts only."""
    model = CASES["experts"].model()
    used: list[int] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: used.append(len(out[2].unique())))
    for ids in batches(CASES["experts"])[0][0].tensor_split(num_ranks):
        model(input_ids=ids)
    assert min(used) < model.config.num_experts


@pytest.mark.launcher
def test_runs_are_cut_by_shard_edges(world) -> None:
    """What test_zero3 shows holds for masks whose units, inside a row, lie on both sides of an edge."""

    def total(num_ranks: int, name: str, what: str) -> int:
        return sum(report["parity"][name][what] for report in world(num_ranks).reports)

    for num_ranks, name in (
        (2, "block-accumulated-recomputed"),
        (2, "row"),
        (3, "qwen2-rows"),
        (2, "head"),
        (3, "tensor"),
    ):
        assert total(num_ranks, name, "cut_runs") > 0, (num_ranks, name)
    for num_ranks in (2, 3):
        assert total(num_ranks, "element-everything", "cut_rows") > 0


@pytest.mark.launcher
def test_some_ranks_own_nothing(world) -> None:
    """What test_zero3 shows holds where a parameter has fewer elements than there are ranks."""
    assert CASES["sliver"].model().get_parameter("model.layers.0.mlp.gate_proj.bias").numel() == 1
    assert world(3).section("parity")["sliver"]["owns_nothing"] > 0
