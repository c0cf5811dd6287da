"""The race of optimizer steps, on layers of a size that takes milliseconds."""

from __future__ import annotations

import pytest
import torch

from trace_dist.benchmarks import optimizer


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "WIDTH", 128)
    monkeypatch.setattr(optimizer, "NUM_LAYERS", 3)
    monkeypatch.setattr(optimizer, "PEERS", ("torch fused AdamW",))  # the other is compiled for a minute


@pytest.mark.usefixtures("small")
def test_rows_are_those_of_every_contestant_and_dtype() -> None:
    threads = torch.get_num_threads()
    result = optimizer.race_optimizers(density=0.1, rounds=2)
    assert torch.get_num_threads() == threads
    names = [*optimizer.MASKS, "torch fused AdamW"]
    assert [(row["weights"], row["name"]) for row in result["rows"]] == [
        (weights, name) for weights in ("bfloat16", "float32") for name in names
    ]
    assert all(row["speedup"] == 1 for row in result["rows"] if row["name"] == "torch fused AdamW")
    assert result["settings"]["num_parameters"] == 3 * 128**2


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*optimizer.MASKS, "torch fused AdamW"])
def test_every_step_changes_its_share_of_the_weights(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[optimizer.Layers] = []
    layers = optimizer.Layers

    class Watched(layers):  # type: ignore[misc, valid-type]
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__(dtype)
            made.append(self)

    monkeypatch.setattr(optimizer, "Layers", Watched)
    masked = name in optimizer.MASKS
    step = optimizer._masked_step(name, 0.1, dtype) if masked else optimizer._peer_step(name, dtype)
    before = [weight.detach().clone() for weight in made[0].parameters()]
    for _ in range(30):  # until a bf16 weight has moved by more than its rounding
        step()
    changed = [(now != then).float().mean() for now, then in zip(made[0].parameters(), before, strict=True)]
    assert sum(changed) / len(changed) == pytest.approx(0.1 if masked else 1.0, rel=0.15)
