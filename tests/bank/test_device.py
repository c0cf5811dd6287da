"""Representations, signatures and scores of a model on a GPU that is not there (engine/fake_gpu.py)."""

from __future__ import annotations

import pytest
import torch
from engine.cases import CASES
from engine.fake_gpu import OnGpu, fake_gpu, on_gpu, place
from torch import Tensor

from trace_dist.bank.representation import represent
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import fit_signature
from trace_dist.masks.ops import layouts_for
from trace_dist.projection.placements.magnitude import magnitude_scores
from trace_dist.projection.unit_means import reduce_units
from trace_dist.sharding.prepared import as_sharded

PROMPTS = [[3 + i % 5, 4, 5 + i % 3, 6][: 2 + i % 3] for i in range(24)]


def tour(device: str) -> list[Tensor]:
    """Everything that ends on the CPU."""
    module = CASES["element"].model()
    module.set_attn_implementation("eager")
    module = place(module, device)
    hidden = represent(module, PROMPTS, layer=-1, batch_size=4, pad_id=0)
    moved = on_gpu(hidden) if device == "cuda" else hidden
    signatures = [fit_signature(moved * scale, 3, 0, name) for name, scale in (("a", 1), ("b", 2))]
    retriever = Retriever(signatures)
    model = as_sharded(module)
    found = [hidden, signatures[0].means, retriever.scores(moved), retriever.predict(moved)]
    for granularity in ("element", "row"):
        for name, layout in layouts_for(module, granularity, 1, "linear").items():
            found.append(magnitude_scores(model)(name, layout))
            units = torch.arange(layout.num_units, device=model.device)
            found.append(reduce_units(model, name, layout, units.double(), units, by_unit=True))
    return found


def test_scores_of_a_model_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tour("cpu")
    with fake_gpu(monkeypatch):
        found = tour("cuda")
    assert not any(isinstance(tensor, OnGpu) for tensor in found)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
