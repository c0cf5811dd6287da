"""ZeRO-3's stale gathers ([Note: stale gathers] in sharding/zero3.py), and use between training steps."""

from __future__ import annotations

import pytest
import torch
from engine.cases import CASES, batches
from engine.toy import train_toy_in_one_process
from transformers import AutoModelForCausalLM, GenerationConfig

pytestmark = pytest.mark.launcher


def drift(losses: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))


@pytest.mark.parametrize("name", ["embedding", "lowest-layer", "norms", "small-matrices"])
def test_training_drifts_without_the_mitigation(world, name: str) -> None:
    """The masked embedding and the lowest masked layer keep a copy that nobody released; norms and small matrices one that
    DeepSpeed keeps on purpose. Silent in both cases: only the losses tell."""
    found = world(2).section("traps")[name]
    expected = found["reference"]
    assert drift(found["right"], expected) < 2e-6
    assert drift(found["broken"], expected) > 1e-4
    assert found["broken"][0] == found["right"][0]  # the first forward pass precedes the first update


@pytest.mark.parametrize(("name", "of_its_block"), [("embedding", 1), ("lowest-layer", 9)])
def test_nothing_stays_gathered_after_a_step(world, name: str, of_its_block: int) -> None:
    found = world(2).section("traps")[name]
    assert found["right_gathered"] == 0
    assert found["broken_gathered"] == of_its_block


def test_a_forgotten_release_cannot_be_refreshed_silently(world) -> None:
    """With ``refresh`` in place, DeepSpeed refuses to free what backward still holds."""
    assert "still active in submodules" in world(2).section("traps")["refusal"]


@pytest.mark.parametrize("threshold", [0, 500])
def test_evaluation_between_steps_changes_nothing(world, threshold: int) -> None:
    for report in world(2).reports:
        found = report["interleaving"]
        assert found[f"losses-{threshold}-True"] == found[f"losses-{threshold}-False"]
        right = [value for key, value in found.items() if key.startswith(f"disturbance-{threshold}-")]
        assert right == [True] * 6


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_layers_that_run_twice_or_not_at_all(world, num_ranks: int, granularity: str) -> None:
    found = world(num_ranks).section("toy")[granularity]
    for name, value in train_toy_in_one_process(granularity, num_ranks).items():
        torch.testing.assert_close(torch.tensor(found[name]), value, rtol=0, atol=1e-6)


def test_a_sharded_model_is_exported_whole(world) -> None:
    folder = world(2).folder / "exported"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, value in world(2).state("exported").items():
        assert torch.equal(model.state_dict()[name], value), name
    assert GenerationConfig.from_pretrained(folder).max_length == 77


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_loaded_into_shards_trains_alike(world, dtype: str) -> None:
    loaded, sharded = world(2).section("loading")[dtype]
    assert loaded == sharded


def test_full_training_beside_it_is_dense_adamw(world) -> None:
    """What masked training is compared with: every parameter, clipped at 1, under DeepSpeed's own optimizer wrapper."""
    case = CASES["qwen2-biases"]
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    expected = []
    for ids, _ in batches(case):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert world(2).section("loading")["full"] == pytest.approx(expected, rel=2e-6)
    # and so is a full mask
    assert world(2).section("loading")["full density"] == pytest.approx(expected, rel=2e-6)
    numel = sum(parameter.numel() for parameter in model.parameters())
    for report in world(2).reports:
        for name, num_bytes in report["loading"]["full_states"].items():
            assert num_bytes == pytest.approx(4 * numel / 2, rel=0.05), name


def test_a_job_leaves_nothing_in_shared_memory(world) -> None:
    """DeepSpeed would build an operator for an all-reduce through shared memory, which nobody unlinks."""
    for report in world(2).reports:
        assert report["shared_memory"] == {"left": [], "operator": "None", "tried": False}
