"""Units with alike activations are found again: of a permuted model, and of one with other numbers of heads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from probe.setting import make_batches, make_config, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from trace_dist.masks.ops import layouts_for, place
from trace_dist.projection import activations
from trace_dist.projection.activations import Moments, correlations
from trace_dist.projection.assignment import Attention, assigned, match_heads
from trace_dist.projection.placements import align
from trace_dist.projection.placements.align import Options, matching, scores
from trace_dist.projection.site import Shown, Site
from trace_dist.sharding.build import shard

SHAPE = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40}


def permuted(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The same function with its channels, groups, heads, value dimensions and neurons in another order."""
    generator = torch.Generator().manual_seed(3)
    other = make_model(**SHAPE)

    def order(n: int) -> torch.Tensor:
        return torch.randperm(n, generator=generator)

    hidden, neurons, groups, values = order(24), order(40), order(3), order(4)
    inside = torch.stack([order(2) for _ in range(3)])
    # Query heads go with their group, in an order of their own within it.
    queries = torch.cat([2 * group + inside[place] for place, group in enumerate(groups.tolist())])
    places = torch.arange(4)
    rows = {
        "q": (queries[:, None] * 4 + places).flatten(),
        "k": (groups[:, None] * 4 + places).flatten(),
        "v": (groups[:, None] * 4 + values).flatten(),
        "o": (queries[:, None] * 4 + values).flatten(),
    }
    mine, its = dict(other.named_parameters()), dict(model.named_parameters())
    for name, weight in mine.items():
        source = its[name].detach()
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj", "v_proj"):
            source = source[rows[part[0]]][:, hidden]
        elif part == "o_proj":
            source = source[hidden][:, rows["o"]]
        elif part in ("gate_proj", "up_proj"):
            source = source[neurons][:, hidden]
        elif part == "down_proj":
            source = source[hidden][:, neurons]
        else:
            source = source[..., hidden]
        weight.data.copy_(source)
    return other, {"hidden": hidden, "mlp": neurons, **rows}


def test_correlations_are_those_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(50, 4, generator=generator), torch.randn(50, 3, generator=generator)
    left[:, 1] = 2 - 3 * right[:, 2]
    right[:, 0] = 5.0
    moments = Moments()
    moments.add(left[:20], right[:20])
    moments.add(left[20:], right[20:])
    found = moments.correlation()
    expected = torch.corrcoef(torch.cat([left, right[:, 1:]], 1).T)[:4, 4:]
    torch.testing.assert_close(found[:, 1:], expected, rtol=1e-4, atol=1e-5)
    assert float(found[1, 2]) == pytest.approx(-1, abs=1e-5)
    assert not bool(found[:, 0].any())


@pytest.mark.parametrize("parts", [[401], [1, 150, 0, 250]])
def test_channels_far_from_0_keep_their_digits(parts: list[int]) -> None:
    """As the residual streams of large models have them: the same correlations and matches as in fp64."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(401, 17, generator=generator)
    left = shared[:, torch.randperm(17, generator=generator)] + 0.7 * torch.randn(
        401, 17, generator=generator
    )
    right = shared[:, :13] + 0.7 * torch.randn(401, 13, generator=generator)
    left, right = left + 3000, right * 0.5 - 2000
    moments = Moments()
    for mine, its in zip(left.split(parts), right.split(parts), strict=True):
        moments.add(mine, its)
    found = moments.correlation()
    expected = torch.corrcoef(torch.cat([left, right], 1).double().T)[:17, 17:]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    assert torch.equal(assigned(found.abs()).units, assigned(expected.abs()).units)


def test_units_are_matched_one_to_one_and_the_rest_to_the_most_alike() -> None:
    likeness = torch.tensor([[0.9, 0.8], [0.95, 0.1], [0.2, 0.3]])
    found = assigned(likeness)
    # The first gives up its best for the sake of the second; the third takes what it is most like.
    assert found.units.tolist() == [1, 0, 1]
    assert found.worth.tolist() == pytest.approx([0.8, 0.95, 0.3])
    assert assigned(likeness.T).units.tolist() == [1, 0]


def site_for(target: Any, proxy: Any, module: Any) -> Site:
    cfg, model = make_config(), shard(target)
    layouts = layouts_for(model, "element", 1, "all")
    theirs = layouts_for(proxy, "element", 1, "all")
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.rand(layout.numel, generator=generator) for name, layout in theirs.items()}
    budgets = {name: 0.1 * layout.numel for name, layout in layouts.items()}
    shown = Shown(values, theirs, None, module)
    return Site(model, layouts, "element", budgets, "t", make_batches, cfg.probe, cfg.train, 0, {}, shown)


def test_a_permuted_model_is_found_again() -> None:
    proxy = make_model(**SHAPE)
    for parameter in proxy.parameters():
        parameter.data.normal_(std=0.3)  # activations that differ
    target, order = permuted(proxy)
    tokens = torch.arange(2, 30)[None]
    torch.testing.assert_close(target(tokens).logits, proxy(tokens).logits, rtol=1e-3, atol=1e-3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    site = site_for(target, proxy, proxy)
    found, shown = scores(site, Options()), site.shown
    assert shown is not None
    for name, layout in site.layouts.items():
        values, part = shown.scores[name].view(layout.shape), name.split(".")[-2]
        if part in ("q_proj", "k_proj", "v_proj"):
            values = values[order[part[0]]][:, order["hidden"]]
        elif part == "o_proj":
            values = values[order["hidden"]][:, order["o"]]
        elif part in ("gate_proj", "up_proj"):
            values = values[order["mlp"]][:, order["hidden"]]
        elif part == "down_proj":
            values = values[order["hidden"]][:, order["mlp"]]
        else:
            values = values[..., order["hidden"]]
        # Query and key rows are worth what their group's values are, about 1.
        torch.testing.assert_close(found(name, layout).view(layout.shape), values, rtol=0.02, atol=0.01)
    assert all(torch.equal(value, before[name]) for name, value in site.model.full_state_dict().items())
    mask = place(site.layouts, "element", site.budgets, found)
    told = matching(site, mask)
    assert told["activations"]["entries"] == mask.num_entries
    assert told["layers"] == {"0": [0], "1": [1]}


def test_other_numbers_of_layers_heads_and_channels_are_matched() -> None:
    proxy = make_model(**SHAPE)
    target = make_model(
        hidden_size=32,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=60,
        num_hidden_layers=3,
    )
    site = site_for(target, proxy, proxy)
    found = scores(site, Options(batches=2))
    mask = place(site.layouts, "element", site.budgets, found)
    assert mask.num_entries == pytest.approx(0.1 * mask.num_maskable, abs=1)
    assert matching(site, mask)["layers"] == {"0": [0], "1": [0], "2": [1]}
    for name, layout in site.layouts.items():
        assert float(found(name, layout).min()) >= 0


def test_of_several_streams_the_tokens_own_is_matched() -> None:
    """Those of Gemma 3n lie before the batch."""
    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=37, vocab_size_per_layer_input=37, hidden_size=24, intermediate_size=[40] * 2,
        num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, head_dim=4, num_kv_shared_layers=0,
        hidden_size_per_layer_input=4, laurel_rank=4, altup_num_inputs=3, activation_sparsity_pattern=[0.0] * 2,
        layer_types=["sliding_attention", "full_attention"], bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    matched = align.Alignment.of(site_for(copy.deepcopy(model), model, model), 2).hidden
    assert matched.units.tolist() == list(range(24))


def test_groups_of_query_heads_stay_together() -> None:
    """Two groups of three heads of the target are those of three groups of two: each query head is of the matched group."""
    correlation = torch.rand(6 * 4, 6 * 4, generator=torch.Generator().manual_seed(0))
    found = match_heads(correlation, Attention(6, 2, 4, 4), Attention(6, 3, 4, 4))
    groups = found["k"].units.view(2, 4)[:, 0] // 4
    heads = found["q"].units.view(6, 4)[:, 0] // 4
    assert (heads // 2).tolist() == groups.repeat_interleave(3).tolist()
    assert len(set(groups.tolist())) == 2
    assert torch.equal(found["o"].units.view(6, 4) // 4, heads[:, None].expand(6, 4))
    halves = match_heads(torch.rand(12, 12), Attention(2, 1, 6, 6), Attention(4, 2, 3, 3))
    assert (halves["q"].units.view(2, 6) % 3).tolist() == [[0, 0, 1, 1, 2, 2]] * 2


def test_correlations_put_the_models_back_in_their_modes() -> None:
    proxy = make_model(**SHAPE).train()
    model = shard(make_model(**SHAPE))
    model.train()
    found = correlations(model, proxy, {0: 0, 1: 1}, make_batches(), 1)
    assert proxy.training
    assert model.module.training
    assert {key: tuple(each.shape) for key, each in found.items()} == {
        (place, layer): (size, size)
        for layer in (0, 1)
        for place, size in (("hidden", 24), ("heads", 24), ("intermediate", 40))
    }
    assert not any(module._forward_pre_hooks for module in proxy.modules())


def test_layers_are_read_a_few_at_a_time_where_their_sums_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same matches."""
    target, proxy, read = make_model(**SHAPE, num_hidden_layers=3), make_model(**SHAPE), []

    def watched(*arguments: Any) -> Any:
        read.append(list(arguments[2]))
        return correlations(*arguments)

    monkeypatch.setattr(align, "correlations", watched)
    site = site_for(target, proxy, proxy)
    one_pass = align.Alignment.of(site, 2)
    # of a layer: 24 channels, 24 columns of heads and 40 neurons, of both
    monkeypatch.setattr(activations, "MOST_BYTES", 2 * 4 * (24**2 + 24**2 + 40**2))
    passes = align.Alignment.of(site, 2)
    assert read == [[0, 1, 2], [0, 1], [2]]
    monkeypatch.setattr(activations, "MOST_BYTES", 1)
    assert list(activations.passes(target, proxy, {0: 0, 1: 0, 2: 1})) == [{0: 0}, {1: 0}, {2: 1}]
    assert torch.equal(passes.hidden.units, one_pass.hidden.units)
    assert passes.rows.keys() == one_pass.rows.keys()
    assert all(torch.equal(passes.rows[key].units, each.units) for key, each in one_pass.rows.items())


def test_layers_of_several_experts_are_refused() -> None:
    model = make_model(**SHAPE)
    mlp = model.model.layers[1].mlp
    mlp.experts = torch.nn.ModuleList(
        torch.nn.ModuleDict({"down_proj": torch.nn.Linear(40, 24)}) for _ in "ab"
    )
    with pytest.raises(ValueError, match="layer 1 has several down weights, such as model"):
        activations.places_of(model)


def test_a_proxy_of_other_tokens_is_refused() -> None:
    proxy = make_model(**SHAPE)
    with pytest.raises(
        ValueError, match=r"projection.placement='align': the proxy does not read the target's tokens"
    ):
        scores(site_for(make_model(**SHAPE), proxy, None), Options())
