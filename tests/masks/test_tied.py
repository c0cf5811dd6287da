"""Granularities of their own for some roles, and neurons whose rows and columns are selected together."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from trace_dist.config import MaskConfig
from trace_dist.config.granularity import ROLES, Granularities
from trace_dist.masks import Mask
from trace_dist.masks.ops import compete, layouts_for, place, random_mask
from trace_dist.models.roles import Role, describe
from trace_dist.studies.nested import nested_masks

MLP = ("gate_proj", "up_proj", "down_proj")


def test_each_role_has_units_of_its_own(tiny: Any) -> None:
    layouts, infos = (
        layouts_for(tiny, "row, q=head, o=column, down=element, up=block", 16, "linear"),
        describe(tiny),
    )
    expected = {"q": 12 * 36, "o": 36, "down": 1, "up": 16}
    for name, layout in layouts.items():
        assert layout.unit == expected.get(infos[name].role, layout.cols), name
        assert (layout.stride > 1) == (infos[name].role == "o")


def test_the_roles_are_those_of_models() -> None:
    assert get_args(Role) == ROLES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows", r"mask.granularity='rows': must be one of 'element', 'block'"),
        ("row,keys=head", r"mask.granularity='row,keys=head': 'keys' is no role"),
        ("row,q=head,q=row", r"'q' is no role, or named twice"),
        ("row,q", r"must be one of"),
        ("tensor,q=row", r"tensor takes all tensors whole"),
        ("row,down=neuron", r"a neuron lies in gate, up and down"),
        ("neuron,up=element", r"a neuron lies in gate, up and down"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskConfig(granularity=text)


def test_a_neuron_may_be_that_of_the_mlp_alone() -> None:
    found = Granularities.parse("head,gate=neuron,up=neuron,down=neuron")
    assert [found.of(role) for role in ("q", "gate", "up", "down")] == ["head", "row", "row", "column"]


def neurons(mask: Mask, layer: int) -> list[list[int]]:
    """The units of the three matrices of an MLP."""
    names = [f"model.layers.{layer}.mlp.{part}.weight" for part in MLP]
    return [mask.units[name].tolist() if name in mask.units else [] for name in names]


def scores_of(layouts: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(layout.num_units, generator=generator) for name, layout in layouts.items()}


@pytest.mark.parametrize("refused", [False, True])
def test_the_best_neurons_and_rows_are_taken_together(tiny: Any, refused: bool) -> None:
    """Against a sorted list of all neurons of 3 * 36 and all rows of 36 elements."""
    layouts = layouts_for(tiny, "neuron", 1, "linear")
    scores, held = scores_of(layouts), {}
    if refused:
        held = {"model.layers.0.mlp.down_proj.weight": torch.arange(0, 50, 3, dtype=torch.int32)}
    mask = compete(layouts, "neuron", 0.2, lambda name, _: scores[name], refused=held)
    everything = []
    for layer in (0, 1):
        parts = [scores[f"model.layers.{layer}.mlp.{part}.weight"].double() for part in MLP]
        means = (sum(parts) / 3).tolist()
        free = [j for j in range(50) if not (refused and layer == 0 and j % 3 == 0)]
        everything += [(means[j], 108, ("neuron", layer, j)) for j in free]
    for name, score in scores.items():
        if "mlp" not in name:
            everything += [(value, 36, (name, row)) for row, value in enumerate(score.tolist())]
    total, taken, expected = sum(layout.numel for layout in layouts.values()), 0, set()
    for _, size, what in sorted(everything, key=lambda each: -each[0]):
        if 2 * taken + size > 2 * 0.2 * total:
            break
        taken += size
        expected.add(what)
    found = set()
    for layer in (0, 1):
        gate, up, down = neurons(mask, layer)
        assert gate == up == down
        found |= {("neuron", layer, j) for j in gate}
    found |= {
        (name, row) for name, units in mask.units.items() if "mlp" not in name for row in units.tolist()
    }
    assert found == expected
    assert mask.num_entries == taken


def test_budgets_random_masks_and_nested_ones_keep_neurons_whole(tiny: Any) -> None:
    layouts = layouts_for(tiny, "neuron,q=head,k=head,v=head", 1, "linear")
    granularity, scores = "neuron,q=head,k=head,v=head", scores_of(layouts)
    budgets = {name: (0.3 if "up" in name else 0.1) * layout.numel for name, layout in layouts.items()}
    placed = place(layouts, granularity, budgets, lambda name, _: scores[name])
    masks = [placed, random_mask(layouts, granularity, 0.1, seed=0)]
    masks += nested_masks(layouts, granularity, [0.05, 0.2], lambda name, _: scores[name]).values()
    for mask in masks:
        for layer in (0, 1):
            gate, up, down = neurons(mask, layer)
            assert gate == up == down
            assert gate
    assert abs(len(neurons(placed, 0)[0]) - (0.3 + 0.1 + 0.1) / 3 * 50) <= 1
    assert Mask.random(tiny, 0.1, granularity) == masks[1]
    assert masks[2].num_entries < masks[3].num_entries


def test_the_mask_file_keeps_the_granularity(tiny: Any, tmp_path: Any) -> None:
    mask = Mask.random(tiny, 0.1, "neuron,o=column")
    mask.save(tmp_path / "mask.safetensors")
    again = Mask.load(tmp_path / "mask.safetensors")
    assert again == mask
    assert again.granularity == "neuron,o=column"
