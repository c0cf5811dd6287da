"""Budgets of the target, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probe.setting import make_model

from trace_dist.config import MaskConfig
from trace_dist.config.mask import Spread
from trace_dist.masks import Mask, UnitLayout
from trace_dist.masks.ops import layouts_for, mask_from_scores, place
from trace_dist.models.roles import describe
from trace_dist.projection.budget import carry_over, project_budgets, scale_budgets, unmatched
from trace_dist.projection.project import project_tensors
from trace_dist.sharding.build import shard

Layouts = dict[str, UnitLayout]


def layouts_of(num_layers: int, size: int, modules: tuple[str, ...]) -> Layouts:
    """Square weights of every module in every layer."""
    return {
        f"model.layers.{layer}.{module}.weight": UnitLayout((size, size), 1)
        for layer in range(num_layers)
        for module in modules
    }


def mask_with(layouts: Layouts, densities: dict[str, float]) -> Mask:
    """A mask that holds the first elements of each tensor, as many as its density says."""
    units = {}
    for name, layout in layouts.items():
        count = round(densities.get(name, 0) * layout.numel)
        if count:
            units[name] = torch.arange(count, dtype=torch.int32)
    return Mask(units, layouts, "element")


def projected(proxy: Mask, target: Layouts, density: float) -> dict[str, float]:
    def infos(layouts: Layouts) -> dict:
        return describe({name: layout.shape for name, layout in layouts.items()})

    return project_budgets(proxy, infos(dict(proxy.layouts)), target, infos(target), density)


def test_layers_are_interpolated_by_relative_depth() -> None:
    """Three proxy layers at depth 0, 1/2, 1; five target layers at 0, 1/4, 1/2, 3/4, 1."""
    proxy_layouts = layouts_of(3, 10, ("mlp.up_proj",))
    proxy = mask_with(proxy_layouts, dict(zip(proxy_layouts, (0.1, 0.3, 0.2), strict=True)))
    target = layouts_of(5, 20, ("mlp.up_proj",))
    shares = [0.1, 0.2, 0.3, 0.25, 0.2]
    budgets = projected(proxy, target, 0.21)  # the mean of the shares: nothing to scale
    assert list(budgets.values()) == pytest.approx([400 * share for share in shares])
    halved = projected(proxy, target, 0.105)
    assert list(halved.values()) == pytest.approx([200 * share for share in shares])


def test_roles_are_matched_and_a_missing_role_takes_the_mean_density() -> None:
    proxy_layouts = layouts_of(2, 10, ("self_attn.q_proj", "mlp.up_proj"))
    densities = {name: 0.4 if "q_proj" in name else 0.2 for name in proxy_layouts}
    target = layouts_of(1, 10, ("self_attn.q_proj", "mlp.up_proj", "self_attn.o_proj"))
    budgets = projected(mask_with(proxy_layouts, densities), target, 0.3)
    assert list(budgets.values()) == pytest.approx([40, 20, 30])


def infos_of(layouts: Layouts) -> dict:
    return describe({name: layout.shape for name, layout in layouts.items()})


Q, K, V, QKV = (f"self_attn.{part}_proj" for part in ("q", "k", "v", "qkv"))
GATE, UP, GATE_UP, DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "gate_up", "down"))


@pytest.mark.parametrize(
    ("theirs", "densities", "ours", "expected"),
    [
        ((Q, K, V), (0.1, 0.2, 0.3), (QKV,), [0.2]),
        ((QKV,), (0.2,), (Q, K, V), [0.2] * 3),
        ((GATE, UP), (0.1, 0.3), (GATE_UP,), [0.2]),
        ((GATE_UP,), (0.2,), (GATE, UP), [0.2] * 2),
        ((UP,), (0.2,), (UP, GATE), [0.2] * 2),
    ],
)
def test_what_a_family_fuses_is_matched(
    theirs: tuple[str, ...], densities: tuple[float, ...], ours: tuple[str, ...], expected: list[float]
) -> None:
    """Beside another role of density 0.6, which is not averaged in; of the first of two layers."""
    proxy, target = layouts_of(2, 10, (*theirs, DOWN)), layouts_of(3, 20, (*ours, DOWN))
    values = {name: 0.6 if DOWN in name else densities[theirs.index(name[15:-7])] for name in proxy}
    carried = carry_over(values, infos_of(proxy), infos_of(target), target, default=9.0)
    assert list(carried.values()) == pytest.approx([*expected, 0.6] * 3)
    assert not unmatched(infos_of(proxy), infos_of(target), target)


@pytest.mark.parametrize("fused", ["proxy", "target"])
def test_experts_are_matched_with_matrices_of_their_role(fused: str) -> None:
    dense = layouts_of(2, 10, (GATE, UP, DOWN))
    experts = {
        f"model.layers.{layer}.mlp.experts.{part}": UnitLayout((4, size, 10), 1)
        for layer in range(2)
        for part, size in (("gate_up_proj", 20), ("down_proj", 10))
    }
    proxy, target = (experts, dense) if fused == "proxy" else (dense, experts)
    values = {name: 0.6 if "down" in name else 0.2 for name in proxy}
    carried = carry_over(values, infos_of(proxy), infos_of(target), target, default=9.0)
    assert carried == pytest.approx({name: 0.6 if "down" in name else 0.2 for name in target})


def test_what_the_proxy_has_no_like_of_is_counted() -> None:
    """Neither the norm, though the proxy has biases of its size, nor the output weight."""
    bias = {"model.layers.0.mlp.up_proj.bias": UnitLayout((10,), 1)}
    norm = {"model.layers.0.input_layernorm.weight": UnitLayout((10,), 1)}
    proxy = layouts_of(1, 10, (UP,)) | bias
    target = layouts_of(1, 10, (UP, "self_attn.o_proj")) | norm | bias
    assert unmatched(infos_of(proxy), infos_of(target), target) == pytest.approx(
        {"o": 100 / 220, "norm": 10 / 220}
    )
    assert not unmatched(infos_of(target), infos_of(target), target)


def test_a_mask_says_what_the_proxy_had_no_like_of(caplog: pytest.LogCaptureFixture) -> None:
    model = shard(make_model())
    shapes = {name: layout.shape for name, layout in layouts_for(model, "tensor", 1, "linear").items()}
    scores = {name: 1.0 for name in shapes if "mlp" not in name}
    mask = MaskConfig(density=0.5, granularity="tensor")
    made = project_tensors(model, scores, {name: shapes[name] for name in scores}, mask)
    # 36 channels, 50 neurons, 3 heads of 12 rows and one of keys and values
    mlp, attention = 36 * 50, 36 * 12 * (3 + 1 + 1 + 3)
    share = pytest.approx(mlp / (3 * mlp + attention))
    assert made.meta["unmatched"] == {"gate": share, "up": share, "down": share}
    assert f"the roles gate, up, down, {round(300 * mlp / (3 * mlp + attention))} %" in caplog.text
    assert "unmatched" not in project_tensors(model, dict.fromkeys(shapes, 1.0), shapes, mask).meta


def test_a_bias_is_not_matched_with_a_matrix() -> None:
    proxy = {"model.layers.0.mlp.up_proj.weight": UnitLayout((10, 10), 1)}
    target = {**proxy, "model.layers.0.mlp.up_proj.bias": UnitLayout((10,), 1)}
    budgets = projected(mask_with(proxy, dict.fromkeys(proxy, 0.5)), target, 0.5)
    assert list(budgets.values()) == pytest.approx([50, 5])


def test_parameters_outside_the_layers() -> None:
    proxy = {
        "model.embed_tokens.weight": UnitLayout((10, 10), 1),
        "model.layers.0.mlp.up_proj.weight": UnitLayout((10, 10), 1),
    }
    densities = dict(zip(proxy, (0.1, 0.5), strict=True))
    target = {
        "model.embed_tokens.weight": UnitLayout((20, 20), 1),
        **layouts_of(3, 20, ("mlp.up_proj",)),
    }
    budgets = projected(mask_with(proxy, densities), target, 0.4)
    assert list(budgets.values()) == pytest.approx([40, 200, 200, 200])


def test_two_norms_of_a_layer_count_as_one() -> None:
    """Both are of the role norm and at one depth: the target's norms take their mean, whatever their order."""
    norms = ("input_layernorm", "post_attention_layernorm")
    proxy = {f"model.layers.{i}.{norm}.weight": UnitLayout((10,), 1) for i in range(2) for norm in norms}
    mask = mask_with(proxy, dict(zip(proxy, (0.0, 0.4, 0.8, 0.0), strict=True)))
    target = {f"model.layers.{i}.{norm}.weight": UnitLayout((20,), 1) for i in range(3) for norm in norms}
    budgets = projected(mask, target, 0.3)
    assert list(budgets.values()) == pytest.approx([4, 4, 6, 6, 8, 8])


def test_the_last_norm_is_not_one_of_the_first_layer() -> None:
    proxy = {
        f"model.{name}.weight": UnitLayout((10,), 1)
        for name in ("layers.0.n_norm", "layers.1.n_norm", "norm")
    }
    target = {
        f"model.{name}.weight": UnitLayout((20,), 1)
        for name in ("layers.0.n_norm", "layers.1.n_norm", "norm")
    }
    budgets = projected(mask_with(proxy, dict(zip(proxy, (0.1, 0.2, 0.9), strict=True))), target, 0.4)
    assert list(budgets.values()) == pytest.approx([2, 4, 18])


@given(st.floats(0.01, 1.0), st.integers(0, 9))
@settings(deadline=None)
def test_the_same_model_is_its_own_projection(density: float, seed: int) -> None:
    """Also where several tensors share role and layer (norms, biases)."""
    layouts: Layouts = layouts_of(3, 8, ("self_attn.q_proj", "mlp.up_proj"))
    for layer in range(3):
        for name in ("input_layernorm", "post_attention_layernorm"):
            layouts[f"model.layers.{layer}.{name}.weight"] = UnitLayout((8,), 1)
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(layout.num_units, generator=generator) for name, layout in layouts.items()}
    mask = mask_from_scores(scores, layouts, "element", density)
    exact = mask.num_entries / mask.num_maskable
    budgets = projected(mask, layouts, exact)
    for name in layouts:
        assert budgets[name] == pytest.approx(mask.tensor_density(name) * layouts[name].numel)
    assert place(layouts, "element", budgets, lambda name, _: scores[name]) == mask


def test_numbers_of_tensors_are_carried_over_by_role_and_depth() -> None:
    """Three proxy layers at depth 0, 1/2, 1; four target layers at 0, 1/3, 2/3, 1; the head is unknown to the proxy."""
    proxy = layouts_of(3, 10, ("mlp.up_proj", "self_attn.q_proj"))
    values = dict(zip(proxy, (3.0, 30.0, 6.0, 10.0, 0.0, 50.0), strict=True))
    target = layouts_of(4, 20, ("mlp.up_proj", "self_attn.q_proj")) | {
        "lm_head.weight": UnitLayout((9, 20), 1)
    }
    infos = [describe({name: layout.shape for name, layout in each.items()}) for each in (proxy, target)]
    carried = carry_over(values, *infos, target, default=7.0)
    up, q = [3, 5, 4, 0], [30, 50 / 3, 70 / 3, 50]
    expected = [number for pair in zip(up, q, strict=True) for number in pair] + [7]
    assert list(carried.values()) == pytest.approx(expected)
    assert carry_over(values, infos[0], infos[0], list(proxy), default=7.0) == values


@given(st.integers(0, 200))
@settings(deadline=None)
def test_budgets_keep_to_floors_and_caps(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layouts = {
        f"t{i}": UnitLayout((1 + int(torch.randint(40, (1,), generator=generator)),), 1) for i in range(6)
    }
    wanted = {name: 10 ** (8 * float(torch.rand(1, generator=generator)) - 4) for name in layouts}
    spread = Spread(floor=0.1, cap=0.5)
    budgets = scale_budgets(wanted, layouts, 0.3, spread)
    assert list(budgets) == list(layouts)
    assert sum(budgets.values()) == pytest.approx(0.3 * sum(layout.numel for layout in layouts.values()))
    for name, layout in layouts.items():
        assert 0.1 * layout.numel * (1 - 1e-6) <= budgets[name] <= 0.5 * layout.numel * (1 + 1e-6)
    # Between the bounds they keep their proportions.
    free = [n for n, each in layouts.items() if 0.1001 * each.numel < budgets[n] < 0.4999 * each.numel]
    factors = [budgets[name] / wanted[name] for name in free]
    assert factors == pytest.approx(factors[:1] * len(factors))


amounts = st.just(0.0) | st.floats(1e-9, 100)


@given(st.lists(st.tuples(st.integers(1, 40), amounts), min_size=1, max_size=6), st.floats(0.01, 1.0))
@settings(deadline=None)
def test_the_sum_is_exact_and_no_tensor_is_filled_beyond_its_size(
    tensors: list[tuple[int, float]], density: float
) -> None:
    layouts = {f"t{i}": UnitLayout((size,), 1) for i, (size, _) in enumerate(tensors)}
    wanted = {f"t{i}": amount for i, (_, amount) in enumerate(tensors)}
    budgets = scale_budgets(wanted, layouts, density)
    assert sum(budgets.values()) == pytest.approx(density * sum(size for size, _ in tensors))
    for name, layout in layouts.items():
        assert -1e-9 <= budgets[name] <= layout.numel * (1 + 1e-6)


def test_water_filling_by_hand() -> None:
    """10 elements to give. In proportion, `a` would get 8 of its 4; its surplus goes to the others, 2 to 1."""
    layouts = {"a": UnitLayout((4,), 1), "b": UnitLayout((10,), 1), "c": UnitLayout((6,), 1)}
    budgets = scale_budgets({"a": 8.0, "b": 4 / 3, "c": 2 / 3}, layouts, 0.5)
    assert budgets == pytest.approx({"a": 4, "b": 4, "c": 2})


def test_tensors_without_a_share_take_what_is_left_when_the_others_are_full() -> None:
    layouts = {"a": UnitLayout((4,), 1), "b": UnitLayout((10,), 1), "c": UnitLayout((6,), 1)}
    assert scale_budgets({"a": 1.0, "b": 0.0, "c": 0.0}, layouts, 0.6) == pytest.approx(
        {"a": 4, "b": 5, "c": 3}
    )
    assert scale_budgets({"a": 1.0, "b": 0.0, "c": 0.0}, layouts, 0.1) == pytest.approx(
        {"a": 2, "b": 0, "c": 0}
    )
    assert scale_budgets(dict.fromkeys("abc", 0.0), layouts, 0.5) == pytest.approx({"a": 2, "b": 5, "c": 3})
