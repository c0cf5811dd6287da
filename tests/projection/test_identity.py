"""A pruned copy's entries at their places in the target, against entry-by-entry references."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from probe.setting import make_batches, make_config, make_model

from trace_dist.masks.ops import layouts_for, place
from trace_dist.models.loading import load_model
from trace_dist.models.origin import Origin
from trace_dist.models.prune import prune
from trace_dist.models.width import Widths
from trace_dist.projection.placements.identity import Options, matching, scores
from trace_dist.projection.placements.refine import fisher_scores
from trace_dist.projection.site import Shown, Site
from trace_dist.sharding.build import shard

SHARDED = [pytest.param(backend, marks=pytest.mark.launcher) for backend in ("zero3", "fsdp2")]


def shown_by(copy: Any, origin: Origin | None, granularity: str = "element", spec: str = "all") -> Shown:
    """Random scores of a copy's units."""
    layouts = layouts_for(copy, granularity, 16, spec)
    generator = torch.Generator().manual_seed(1)
    values = {
        name: torch.rand(layout.num_units, generator=generator) + 0.01 for name, layout in layouts.items()
    }
    return Shown(values, layouts, origin)


def site_for(model: Any, shown: Shown | None, granularity: str = "element", density: float = 0.1) -> Site:
    cfg, layouts = make_config(), layouts_for(model, granularity, 16, "all")
    budgets = {name: density * layout.numel for name, layout in layouts.items()}
    return Site(model, layouts, granularity, budgets, "t", make_batches, cfg.probe, cfg.train, 0, {}, shown)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Origin]:
    """A target of five layers, a copy of three narrower ones, and its record."""
    folder = tmp_path_factory.mktemp("pruned")
    target = make_model(hidden_size=24, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=3)
    target.save_pretrained(folder / "target")
    prune(folder / "target", folder / "copy", 3, Widths(16, 4, 30))
    origin = Origin.load(folder / "copy")
    assert origin is not None
    return target, load_model(folder / "copy"), origin


def dense_top(values: torch.Tensor, count: int) -> set[int]:
    return set(values.flatten().argsort(descending=True, stable=True)[:count].tolist())


@pytest.mark.parametrize("between", ["magnitude", "fisher"])
def test_whole_layers_are_found_again_and_their_channels_between(between: Any) -> None:
    target = make_model(num_hidden_layers=4)
    copy = make_model(num_hidden_layers=2)
    origin = Origin("", "model.layers", [0, 3])
    shown, model = shown_by(copy, origin), shard(target)
    site = site_for(model, shown)
    made = place(site.layouts, "element", site.budgets, scores(site, Options(between)))
    weights = {name: p.detach() for name, p in target.named_parameters()}
    fisher = fisher_scores(model, site.layouts, make_batches(), 2) if between == "fisher" else None

    def score(name: str) -> torch.Tensor:
        return shown.scores[name].view(shown.layouts[name].shape)

    for name, layout in site.layouts.items():
        count = len(made.units.get(name, ()))
        chosen = set(made.units[name].tolist()) if count else set()
        layer = int(name.split(".")[2]) if "layers" in name else None
        if layer in (None, 0, 3):
            values = score(name.replace(".3.", ".1."))
        else:
            parts = [score(name.replace(f".{layer}.", f".{end}.")) for end in (0, 1)]
            shares = [2 / 3, 1 / 3] if layer == 1 else [1 / 3, 2 / 3]
            rows = name.endswith(("o_proj.weight", "down_proj.weight"))
            if len(layout.shape) == 2:
                parts = [part.square().mean(1 if rows else 0).sqrt() for part in parts]
            channels = shares[0] * parts[0] + shares[1] * parts[1]
            own = weights[name].abs() if fisher is None else fisher(name, layout).view(layout.shape)
            values = own * (channels[:, None] if rows else channels)
        assert chosen == dense_top(values, count), name
    found = matching(site, made)
    assert found["layers"] == {"0": [0], "1": [0, 1], "2": [0, 1], "3": [1]}
    assert sum(found[by]["entries"] for by in ("position", "channels", "nothing")) == made.num_entries
    assert found["nothing"] == {"tensors": 0, "entries": 0, "why": {}}


def test_entries_between_are_drawn_in_proportion_to_their_channels() -> None:
    """Twice the importance, twice the entries, as far as few are drawn."""
    target, copy = make_model(num_hidden_layers=3), make_model(num_hidden_layers=2)
    shown = shown_by(copy, Origin("", "model.layers", [0, 2]))
    name, columns = "model.layers.1.mlp.up_proj.weight", torch.ones(36)
    columns[:18] = 4.0
    for layer in (0, 1):
        shown.scores[name.replace(".1.", f".{layer}.")][:] = columns.repeat(50)  # type: ignore[index]
    made = []
    for seed in range(8):
        site = replace(site_for(shard(target), shown), seed=seed)
        one = {name: site.layouts[name]}
        made.append(place(one, "element", {name: 90.0}, scores(site, Options("random"))).dense(name))
    share = float(torch.stack(made)[..., :18].sum()) / (8 * 90)
    assert share == pytest.approx(0.8, abs=0.04)
    assert not torch.equal(made[0], made[1])


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_a_narrower_copy_is_found_again(pruned: Any, granularity: str) -> None:
    """Where the copy's weights are the target's, its scores are; all else comes after, the largest weights first."""
    target, copy, origin = pruned
    shown = shown_by(copy, origin, granularity)
    site = site_for(shard(target), shown, granularity)
    found = scores(site, Options())
    names = dict(copy.named_parameters())
    for name, layout in site.layouts.items():
        layer = origin.layer(name)
        if layer is not None and layer not in origin.layers:
            continue
        source = name if layer is None else origin.moved(name, list(origin.layers).index(layer))
        ours, theirs = target.get_parameter(name).detach(), names[source].detach()
        # Weights are distinct, norms are not, but lie where the channels do.
        places = [
            range(size) if each is None else each.tolist()
            for size, each in zip(theirs.shape, origin.places(source, theirs.shape), strict=True)
        ]
        expected = torch.zeros(ours.shape)
        known = torch.zeros(ours.shape, dtype=torch.bool)
        units = shown.layouts[source].unit_of(torch.arange(theirs.numel())).view(theirs.shape)
        for at in product(*(range(size) for size in theirs.shape)):
            where = tuple(places[dim][index] for dim, index in enumerate(at))
            assert ours[where] == theirs[at]
            expected[where], known[where] = shown.scores[source][units[at]], True
        result = found(name, layout)
        flat, inside = expected.flatten(), known.flatten()
        mean = flat
        if granularity == "row":
            rows = [layout.elements(torch.tensor([u])) for u in range(layout.num_units)]
            mean, inside = (
                torch.stack([flat[u].mean() for u in rows]),
                torch.stack([inside[u].any() for u in rows]),
            )
        torch.testing.assert_close(result[inside], mean[inside])
        if not bool(inside.all()):
            assert float(result[~inside].max()) < float(result[inside].min())


@pytest.mark.parametrize("backend", SHARDED)
def test_shards_give_what_the_whole_model_gives(backend: str, single: Any, request: Any) -> None:
    found = request.getfixturevalue(backend)
    expected, ours = single.part("identity"), found.part("identity")
    assert expected.keys() == ours.keys()
    assert len(ours) > 10
    assert all(torch.equal(value, ours[name]) for name, value in expected.items())
    assert all(fact["matching"] == single.facts[0]["matching"] for fact in found.facts)


def test_what_is_no_piece_of_the_target_is_refused() -> None:
    model = shard(make_model())
    for shown in (None, shown_by(make_model(), None)):
        with pytest.raises(
            ValueError, match=r"projection.placement='identity': .* does not say .*proxy.prune"
        ):
            scores(site_for(model, shown), Options())
    other = shown_by(make_model(hidden_size=24), Origin("", "model.layers", [0, 1]))
    with pytest.raises(
        ValueError, match=r"nothing of the proxy is found in the target: its shape is another"
    ):
        scores(site_for(model, other), Options())


def test_what_shares_no_channels_goes_by_magnitude_and_is_told() -> None:
    """A bias of the query heads of a layer between: neither its rows nor its channels are known."""

    def biased(layers: int) -> Any:
        return make_model(num_hidden_layers=layers, attention_bias=True)

    target, shown = biased(3), shown_by(biased(2), Origin("", "model.layers", [0, 2]))
    target.model.layers[1].self_attn.q_proj.bias.data.normal_()
    site = site_for(shard(target), shown)
    name = "model.layers.1.self_attn.q_proj.bias"
    found = scores(site, Options())(name, site.layouts[name])
    assert torch.equal(found, target.get_parameter(name).detach().abs())
    made = place(site.layouts, "element", site.budgets, scores(site, Options()))
    report = matching(site, made)["nothing"]
    assert report["tensors"] == 3  # of query, key and value
    assert report["why"] == {"it shares no channels with other layers": 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", [2, 0]),
        ("heads", [[0, 1], [-1, 2]]),
        ("heads", [[0, 1]]),
        ("hidden", [0, 0.5]),
        ("head_rows", {"q": 0, "k": 4, "v": 4}),
        ("head_rows", {"q": 4}),
        ("kv_heads", None),
        ("stack", None),
        ("layers", None),
        ("format", "other"),
        ("version", 2),
    ],
)
def test_a_damaged_record_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    origin = Origin(
        "ab",
        "model.layers",
        [0, 2],
        heads=[[0, 1], [1, 2]],
        kv_heads=[[0], [1]],
        head_rows={"q": 4, "k": 4, "v": 4},
    )
    origin.save(tmp_path)
    assert Origin.load(tmp_path) == origin
    assert Origin.load(tmp_path / "nowhere") is None
    path = tmp_path / "pruned.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=r"pruned.json"):
        Origin.load(tmp_path)
