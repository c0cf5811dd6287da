"""Neurons of MLPs in other forms than Llama's: Conv1D, gate and up in one matrix, each matrix in a module of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trace_dist.masks import Mask, UnitLayout
from trace_dist.masks.ops import compete, layouts_for, place
from trace_dist.masks.tied import Tied

WIDE = {
    "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 31,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 12, "n_inner": 20, "n_layer": 2, "n_head": 3, "vocab_size": 31},
    "phi3": WIDE,
    "bert": {**WIDE, "is_decoder": True},
    "llama": WIDE,
}
NEURONS = 20
MATRICES = {
    "gpt2": ("transformer.h.{}.mlp.c_fc.weight", "transformer.h.{}.mlp.c_proj.weight"),
    "phi3": ("model.layers.{}.mlp.gate_up_proj.weight", "model.layers.{}.mlp.down_proj.weight"),
    "bert": ("bert.encoder.layer.{}.intermediate.dense.weight", "bert.encoder.layer.{}.output.dense.weight"),
    "llama": tuple(f"model.layers.{{}}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()


def of_neurons(family: str, matrix: torch.Tensor, last: bool) -> torch.Tensor:
    """[parts, neurons, ...] of a matrix of an MLP: what each neuron reads, or what it writes where the matrix is the last."""
    rows = matrix.T if (family == "gpt2") != last else matrix
    return rows.reshape(-1, NEURONS, rows.shape[1])


def neurons_of(mask: Mask, family: str, layer: int) -> set[int]:
    """The neurons that a mask holds whole; none may be held in part."""
    shares = []
    for name in MATRICES[family]:
        dense = mask.dense(name.format(layer)).float()
        parts = of_neurons(family, dense, last=name == MATRICES[family][-1])
        shares.append(parts.transpose(0, 1).flatten(1))
    share = torch.cat(shares, dim=1).mean(1)
    assert set(share.tolist()) <= {0.0, 1.0}
    return set(share.nonzero().flatten().tolist())


def is_in_mlp(name: str, family: str) -> bool:
    return name in {each.format(layer) for each in MATRICES[family] for layer in (0, 1)}


def unit_scores(scores: torch.Tensor, layout: UnitLayout) -> torch.Tensor:
    return torch.stack(
        [scores.flatten()[layout.elements(torch.tensor([unit]))].mean() for unit in range(layout.num_units)]
    )


def test_the_best_neurons_are_those_of_a_sorted_list(model: Any, family: str) -> None:
    """Scores of single elements, averaged over each neuron in the matrices themselves."""
    layouts = layouts_for(model, "neuron", 1, "linear")
    layouts = {name: layout for name, layout in layouts.items() if is_in_mlp(name, family)}
    elements = {name: torch.rand(layout.shape) for name, layout in layouts.items()}
    budgets = {name: 0.3 * layout.numel for name, layout in layouts.items()}
    scores = {name: unit_scores(elements[name], layout) for name, layout in layouts.items()}
    placed = place(layouts, "neuron", budgets, lambda name, _: scores[name])
    together = compete(layouts, "neuron", 0.3, lambda name, _: scores[name])
    everything = []
    for layer in (0, 1):
        parts = [
            of_neurons(family, elements[name.format(layer)], last=name == MATRICES[family][-1])
            for name in MATRICES[family]
        ]
        means = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1).double().mean(1)
        best = means.argsort(descending=True)[: round(0.3 * NEURONS)].tolist()
        assert neurons_of(placed, family, layer) == set(best)
        everything += [(mean, layer, neuron) for neuron, mean in enumerate(means.tolist())]
    first = sorted(everything, reverse=True)[: round(0.3 * 2 * NEURONS)]
    found = {(layer, neuron) for layer in (0, 1) for neuron in neurons_of(together, family, layer)}
    assert found == {(layer, neuron) for _, layer, neuron in first}


def test_what_a_mask_holds_changes_its_neurons_alone(model: Any, family: str) -> None:
    """What an MLP writes is a sum over its neurons: those that are masked can be cut off by what the mask holds."""
    mask = Mask.random(model, 0.3, "neuron")
    first, last = MATRICES[family][0].format(0), MATRICES[family][-1].format(0)
    chosen, seen = sorted(neurons_of(mask, family, 0)), []
    assert 0 < len(chosen) < NEURONS
    writer = model.get_submodule(last.removesuffix(".weight"))
    writer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        model(input_ids=ids)
        model.get_parameter(first).add_(mask.dense(first).float())
        model(input_ids=ids)
    changed = (seen[0] != seen[1]).any(dim=0).any(dim=0).nonzero().flatten().tolist()
    assert changed == chosen


def test_a_refused_part_refuses_the_neuron(model: Any, family: str) -> None:
    layouts = layouts_for(model, "neuron", 1, "linear")
    first = MATRICES[family][0].format(0)
    held = {first: torch.tensor([2, layouts[first].num_units - 1], dtype=torch.int32)}
    mask = compete(layouts, "neuron", 0.9, lambda _, layout: torch.ones(layout.num_units), refused=held)
    assert neurons_of(mask, family, 0) == set(range(NEURONS)) - {2, NEURONS - 1}


def test_an_mlp_that_cannot_be_tied_is_refused() -> None:
    layouts = {
        "h.0.mlp.gate_up_proj.weight": UnitLayout((60, 12), 12),
        "h.0.mlp.down_proj.weight": UnitLayout((12, 20), 12, 20),
    }
    message = r"^mask\.granularity='neuron': the MLP h\.0\.mlp of the family odd .* has 60 units .* 20 neurons; use row"
    with pytest.raises(ValueError, match=message):
        Tied.of(layouts, "neuron", "odd")
    assert not Tied.of(layouts, "row").groups


def test_neurons_elsewhere_leave_the_mlp_alone() -> None:
    layouts = {f"h.0.mlp.{part}_proj.weight": UnitLayout((20, 12), 12) for part in ("gate", "up")}
    assert not Tied.of(layouts, "row,q=neuron").groups
    assert Tied.of(layouts, "row,gate=neuron,up=neuron,down=neuron").groups
