"""Narrower copies of checkpoint folders: what is kept, by what, and that it is the target's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trace_dist.models.loading import load_model
from trace_dist.models.origin import Origin
from trace_dist.models.prune import prune
from trace_dist.models.width import Heads, Widths

GROUPED = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24}


def part(target: Any, origin: Origin, name: str, shape: torch.Size) -> torch.Tensor:
    layer = origin.layer(name)
    found = target.get_parameter(name if layer is None else origin.moved(name, origin.layers[layer])).detach()
    for dim, places in enumerate(origin.places(name, shape)):
        found = found if places is None else found.index_select(dim, places)
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", GROUPED), ("qwen2", GROUPED), ("gemma3_text", {**GROUPED, "head_dim": 4})],
)
@pytest.mark.parametrize("layers", [None, 2])
def test_every_weight_is_a_part_of_the_targets(family, changes, layers, saved, tmp_path) -> None:
    source = saved(family, **changes)
    prune(source, tmp_path / "copy", layers, Widths(hidden=12, heads=4, intermediate=20))
    target, copy, origin = load_model(source), load_model(tmp_path / "copy"), Origin.load(tmp_path / "copy")
    assert origin is not None
    config = copy.config
    assert config.num_hidden_layers == (layers or 3)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (12, 4, 2)
    assert config.intermediate_size == 20
    for name, weight in copy.named_parameters():
        assert torch.equal(weight, part(target, origin, name, weight.shape)), name
    logits = copy(torch.arange(1, 9)[None]).logits
    assert bool(torch.isfinite(logits).all())


def test_what_is_kept_alone_computes_what_it_did(saved: Any, tmp_path: Path) -> None:
    """Where all else is zero, the narrower copy is the same function."""
    source = saved("llama", **GROUPED)
    target = load_model(source)
    head_rows, dead = 4, (1, 2)  # the first group of query heads goes, and neurons 1 and 2
    for layer in target.model.layers:
        layer.self_attn.o_proj.weight.data[:, : 2 * head_rows] = 0
        layer.mlp.down_proj.weight.data[:, dead] = 0
    target.save_pretrained(tmp_path / "dead")
    prune(tmp_path / "dead", tmp_path / "copy", None, Widths(heads=4, intermediate=48))
    copy, tokens = load_model(tmp_path / "copy"), torch.arange(1, 9)[None]
    origin = Origin.load(tmp_path / "copy")
    assert origin is not None
    assert origin.heads == [[2, 3, 4, 5]] * 3
    torch.testing.assert_close(copy(tokens).logits, target.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_the_largest_by_their_norms_are_kept(saved: Any, tmp_path: Path) -> None:
    source = saved("llama", **GROUPED, tie_word_embeddings=False)
    prune(source, tmp_path / "copy", None, Widths(hidden=12, heads=2, intermediate=9))
    origin, target = Origin.load(tmp_path / "copy"), load_model(source)
    weights = {name: value.detach().double().numpy() for name, value in target.named_parameters()}
    channels = np.zeros(24)
    for name, weight in weights.items():
        if weight.ndim == 2:
            dim = 0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            channels += (weight**2).sum(1 - dim) / (weight**2).mean()
    assert origin is not None
    assert origin.heads is not None
    assert origin.kv_heads is not None
    assert list(origin.hidden or ()) == sorted(np.argsort(-channels)[:12].tolist())
    for index in range(3):
        at = f"model.layers.{index}."
        mlp = [weights[f"{at}mlp.{each}_proj.weight"] for each in ("gate", "up", "down")]
        product = [
            np.linalg.norm(mlp[0][j]) * np.linalg.norm(mlp[1][j]) * np.linalg.norm(mlp[2][:, j])
            for j in range(50)
        ]
        assert list((origin.intermediate or ())[index]) == sorted(np.argsort(-np.array(product))[:9].tolist())
        q, k, v, o = (weights[f"{at}self_attn.{each}_proj.weight"] for each in "qkvo")
        rows = [slice(4 * i, 4 * i + 4) for i in range(6)]
        scores = [
            np.linalg.norm(q[rows[i]]) * np.linalg.norm(k[rows[i // 2]])
            + np.linalg.norm(v[rows[i // 2]]) * np.linalg.norm(o[:, rows[i]])
            for i in range(6)
        ]
        best = int(np.argmax([scores[0] + scores[1], scores[2] + scores[3], scores[4] + scores[5]]))
        assert list(origin.kv_heads[index]) == [best]
        assert list(origin.heads[index]) == [2 * best, 2 * best + 1]


def test_query_heads_that_share_one_key_go_one_by_one() -> None:
    assert Heads.cut(9, 3, 6) == Heads(9, 3, 6, 2)
    assert Heads.cut(9, 1, 4) == Heads(9, 1, 4, 1)
    assert Heads.cut(8, 2, 2) == Heads(8, 2, 2, 2)
    with pytest.raises(
        ValueError, match=r"prune.keep_heads=5: 8 query heads share 2 .* keep one of 2, 4, 6, 8"
    ):
        Heads.cut(8, 2, 5)


@pytest.mark.parametrize(
    ("family", "widths", "message"),
    [
        ("llama", Widths(hidden=40), r"prune.keep_hidden=40: the model has 36; keep 1 to 36"),
        ("llama", Widths(intermediate=60), r"prune.keep_intermediate=60: the model has 50"),
        ("llama", Widths(heads=4), r"prune.keep_heads=4: 3 query heads"),
        ("gpt_neox", Widths(intermediate=20, hidden=18), r"no q weight of their own.*leave keep_hidden"),
        ("mixtral", Widths(intermediate=20), r"cannot be made narrower"),
        ("opt", Widths(hidden=18), r"cannot be made narrower"),
        # Fewer heads, of the same weights: each would be longer.
        ("opt", Widths(heads=2), r"which part of .*k_proj.bias, \[36\], the copy's \[36\] is, is not known"),
        ("stablelm", Widths(heads=1), r"which part of .*k_proj.weight, \[36, 36\], the copy's \[36, 36\] is"),
        # A norm over the neurons, as long as the channels that stay.
        ("bitnet", Widths(hidden=18, intermediate=18), r"ffn_sub_norm.weight, \[50\], the copy's \[18\] is"),
        ("gpt2", Widths(hidden=18), r"cannot be made narrower"),
    ],
)
def test_what_cannot_be_cut_is_refused(family, widths, message, saved, tmp_path) -> None:
    source = saved(family)
    with pytest.raises(ValueError, match=message):
        prune(source, tmp_path / "copy", None, widths)
    assert not (tmp_path / "copy").exists()


def test_layers_that_are_narrower_may_all_stay() -> None:
    from trace_dist.config import PruneConfig

    assert PruneConfig().layers == 8
    assert PruneConfig(keep_layers=5, keep_heads=3).layers == 5
    assert PruneConfig(keep_hidden=64).layers is None
    with pytest.raises(ValueError, match=r"prune.keep_heads=0: must be at least 1"):
        PruneConfig(keep_heads=0)
