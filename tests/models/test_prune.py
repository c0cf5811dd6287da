"""Depth pruning of checkpoint folders."""

from __future__ import annotations

import json

import pytest
import torch

from trace_dist.models.loading import load_model, load_tokenizer
from trace_dist.models.prune import depth_prune, kept_layers
from trace_dist.models.tokenizer import char_tokenizer


@pytest.mark.parametrize(
    ("num_layers", "keep", "expected"),
    [
        (30, 8, [0, 4, 8, 12, 17, 21, 25, 29]),
        (4, 4, [0, 1, 2, 3]),
        (5, 3, [0, 2, 4]),
        (2, 2, [0, 1]),
        (9, 1, [0]),
        (1, 1, [0]),
    ],
)
def test_layers_are_evenly_spaced_with_both_ends(num_layers, keep, expected):
    assert kept_layers(num_layers, keep) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_the_pruned_model_is_the_kept_layers(family, saved, tmp_path):
    source = saved(family, num_hidden_layers=5)
    char_tokenizer({"a": ["one", "two"]}, []).save_pretrained(source)
    out = tmp_path / "proxy"
    depth_prune(source, 3, out)
    target, proxy = load_model(source), load_model(out)
    assert proxy.config.num_hidden_layers == len(proxy.model.layers) == 3
    for layer, index in zip(proxy.model.layers, [0, 2, 4], strict=True):
        expected = target.model.layers[index].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())
    assert torch.equal(proxy.get_output_embeddings().weight, target.get_output_embeddings().weight)
    assert torch.equal(proxy.model.norm.weight, target.model.norm.weight)
    assert load_tokenizer(out).get_vocab() == load_tokenizer(source).get_vocab()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([family, "proxy"]), (
        "left something behind"
    )

    # Taking the other layers out of the target itself gives the same function.
    del target.model.layers[3], target.model.layers[1]
    for i, layer in enumerate(target.model.layers):
        layer.self_attn.layer_idx = i
    target.config.num_hidden_layers = 3
    if getattr(target.config, "layer_types", None):
        target.config.layer_types = [target.config.layer_types[i] for i in (0, 2, 4)]
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(proxy(tokens, use_cache=False).logits, target(tokens, use_cache=False).logits)


def test_per_layer_lists_are_cut(saved, tmp_path):
    types = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    source = saved("gemma3_text", num_hidden_layers=5, layer_types=types)
    depth_prune(source, 3, tmp_path / "proxy")
    config = json.loads((tmp_path / "proxy" / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]


def test_other_architectures_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="gpt_neox keeps its layers elsewhere"):
        depth_prune(saved("gpt_neox"), 1, tmp_path / "proxy")
    assert not (tmp_path / "proxy").exists()


def test_layers_built_by_their_index_are_refused(saved, tmp_path):
    """Layer 1 alone is dense: what was layer 2 would be layer 1, where the config asks for a dense one."""
    source = saved("qwen2_moe", num_hidden_layers=3, mlp_only_layers=[1])
    with pytest.raises(ValueError, match="builds layers by their index"):
        depth_prune(source, 2, tmp_path / "proxy")


@pytest.mark.parametrize("keep", [0, 3])
def test_a_wrong_number_of_layers_is_an_error(keep, saved, tmp_path):
    with pytest.raises(ValueError, match=f"prune.keep_layers={keep}.*keep 1 to 2"):
        depth_prune(saved("llama"), keep, tmp_path / "proxy")


def test_an_existing_folder_is_kept(saved, tmp_path):
    (tmp_path / "proxy").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        depth_prune(saved("llama"), 1, tmp_path / "proxy")
