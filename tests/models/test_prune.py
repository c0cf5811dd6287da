"""Depth pruning of checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trace_dist.models.depth import layer_list
from trace_dist.models.loading import load_model, load_tokenizer
from trace_dist.models.prune import depth_prune, kept_layers
from trace_dist.models.tokenizer import char_tokenizer
from trace_dist.models.weight_files import WEIGHTS


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


def test_sparse_layers_given_by_their_index(saved, tmp_path):
    """Layer 1 alone is dense; what was layer 2 becomes layer 1 and stays sparse."""
    depth_prune(saved("qwen2_moe", num_hidden_layers=3, mlp_only_layers=[1]), 2, tmp_path / "proxy")
    assert load_model(tmp_path / "proxy").config.mlp_only_layers == []


_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_expand": 2,
}
_LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")} | {
    f"linear_num_{name}_heads": 2 for name in ("key", "value")
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_JAMBA = {**_COMMON, "num_experts": 4, "mamba_dt_rank": 4, "mamba_d_state": 4, "use_mamba_kernels": False}
M, A = "linear_attention", "full_attention"

# Family, options, and how many of six layers stay: 0, 2 and 5 of 3 (rounded to even), 0, 1, 2, 4 and 5 of 5.
HYBRIDS = {
    "jamba": (
        {
            **_JAMBA,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        3,
    ),
    "bamba": ({**_COMMON, **_MAMBA2, "attn_layer_indices": [1, 2, 5]}, 3),
    "falcon_h1": ({**_COMMON, **_MAMBA2, "mamba_d_ssm": 64, "head_dim": 8}, 3),
    "granitemoehybrid": (
        {**_COMMON, **_MAMBA2, "num_local_experts": 4, **_MOE, "layer_types": [M, A, M, M, M, A]},
        3,
    ),
    "nemotron_h": (
        {
            **{key: value for key, value in _COMMON.items() if key != "num_hidden_layers"},
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "head_dim": 8,
            "use_mamba_kernels": False,
            "layers_block_type": ["mamba", "attention", "mlp", "mamba", "attention", "mamba"],
        },
        3,
    ),
    "qwen3_next": ({**_COMMON, **_LINEAR, **_MOE, "num_experts": 4, "layer_types": [M, A, M, M, M, A]}, 3),
    "lfm2": ({**_COMMON, "layer_types": ["conv", A, "conv", "conv", A, "conv"]}, 3),
    "gemma3_text": (
        {**_COMMON, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", A] * 3},
        5,
    ),
    "olmo3": ({**_COMMON, "sliding_window": 4, "layer_types": ["sliding_attention"] * 5 + [A]}, 1),
    "recurrent_gemma": (
        {**_COMMON, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 4},
        3,
    ),
    "smollm3": ({**_COMMON, "no_rope_layers": [1, 0, 1, 1, 0, 1]}, 3),
    "deepseek_v3": (
        {
            **_COMMON,
            **_MOE,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 3,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_nextn_predict_layers": 1,
        },
        3,
    ),
    "qwen3_moe": ({**_COMMON, **_MOE, "num_experts": 4, "decoder_sparse_step": 2}, 3),
    "exaone": ({**_COMMON, "num_layers": 6}, 3),
    "gpt_neox": (_COMMON, 3),
    "gpt2": ({"vocab_size": 64, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}, 3),
}


def save_family(family: str, options: dict[str, Any], folder: Path) -> None:
    config = AutoConfig.for_model(family, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)


def skip(layer: nn.Module) -> None:
    """Let a layer pass its input on."""
    forward = layer.forward

    def passing_on(hidden: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop("hidden_states") if hidden is None else hidden
        result = forward(hidden, *args, **kwargs)
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

    layer.forward = passing_on


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_of_several_kinds_stay_what_they_were(family: str, tmp_path: Path) -> None:
    """The reference is the target itself, which passes over the other layers."""
    options, keep = HYBRIDS[family]
    save_family(family, options, tmp_path / "target")
    depth_prune(tmp_path / "target", keep, tmp_path / "proxy")
    target, proxy = load_model(tmp_path / "target"), load_model(tmp_path / "proxy")
    kept = kept_layers(6, keep)
    layers, fewer = (m.get_submodule(str(layer_list(m, m.config))) for m in (target, proxy))
    assert len(fewer) == proxy.config.num_hidden_layers == keep
    assert [type(layer) for layer in fewer] == [type(layers[index]) for index in kept]
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = getattr(target.config, name, None)
        if kinds is not None:
            assert list(getattr(proxy.config, name)) == [kinds[index] for index in kept]
    for index in set(range(6)) - set(kept):
        skip(layers[index])
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        expected, found = (m(tokens, use_cache=False).logits for m in (target, proxy))
    torch.testing.assert_close(found, expected)


def test_layers_that_predict_ahead_are_left_out(tmp_path: Path) -> None:
    options, keep = HYBRIDS["deepseek_v3"]
    save_family("deepseek_v3", options, tmp_path / "target")
    tensors = load_file(tmp_path / "target" / WEIGHTS)
    extra = {"model.layers.6.eh_proj.weight": torch.ones(2, 2), "mtp.layers.0.fc.weight": torch.ones(2, 2)}
    save_file({**tensors, **extra}, tmp_path / "target" / WEIGHTS, {"format": "pt"})
    depth_prune(tmp_path / "target", keep, tmp_path / "proxy")
    names = load_file(tmp_path / "proxy" / WEIGHTS).keys()
    assert not any("eh_proj" in name or "mtp" in name for name in names)
    config = json.loads((tmp_path / "proxy" / "config.json").read_text())
    assert (config["num_nextn_predict_layers"], config["first_k_dense_replace"]) == (0, 2)


def test_the_text_model_of_several_towers_is_pruned(tmp_path: Path) -> None:
    types = ["sliding_attention", A, "sliding_attention", "sliding_attention", A, A]
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    options = {
        "text_config": {**_COMMON, "head_dim": 8, "sliding_window": 4, "layer_types": types},
        "vision_config": {**vision, "num_hidden_layers": 6},
        "mm_tokens_per_image": 4,
    }
    save_family("gemma3", options, tmp_path / "target")
    depth_prune(tmp_path / "target", 3, tmp_path / "proxy")
    target, proxy = load_model(tmp_path / "target"), load_model(tmp_path / "proxy")
    assert proxy.config.text_config.layer_types == [types[index] for index in (0, 2, 5)]
    assert len(proxy.model.vision_tower.encoder.layers) == 6
    for index in (1, 3, 4):
        skip(target.model.language_model.layers[index])
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        expected, found = (m(tokens, use_cache=False).logits for m in (target, proxy))
    torch.testing.assert_close(found, expected)


_GEMMA_3N = {
    **_COMMON,
    "head_dim": 8,
    "intermediate_size": [48] * 6,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "layer_types": ["sliding_attention", A] * 3,
    "activation_sparsity_pattern": [0.0] * 6,
}


_ZAMBA2 = {
    **_COMMON,
    "n_mamba_heads": 4,
    "mamba_d_state": 8,
    "mamba_ngroups": 1,
    "chunk_size": 8,
    "num_mem_blocks": 1,
    "use_mamba_kernels": False,
    "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "mamba", "hybrid"],
}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        # Attention in layers 0 and 4 of 0, 4 and 7: no period does that.
        (
            "jamba",
            {**_JAMBA, "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 0},
            "builds layers by their index",
        ),
        # Every use of the shared block has adapters of its own, numbered.
        ("zamba2", _ZAMBA2, "layer 2 as layer 1 has another shared_transformer"),
        ("diffllama", _COMMON, "layer 2 as layer 1 has another self_attn.lambda_init"),
        ("minicpm3", {**_COMMON, "q_lora_rank": 16, "kv_lora_rank": 16}, "has another residual_scale"),
        ("gemma3n_text", {**_GEMMA_3N, "num_kv_shared_layers": 0}, "has another model.*per_layer"),
        ("gemma3n_text", {**_GEMMA_3N, "num_kv_shared_layers": 2}, "its config takes no such layers"),
        (
            "bart",
            {
                "vocab_size": 64,
                "d_model": 32,
                "encoder_layers": 6,
                "decoder_layers": 6,
                "decoder_ffn_dim": 48,
            },
            "its layers are not one list",
        ),
    ],
)
def test_layers_that_cannot_stay_what_they_were_are_refused(
    family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_family(family, options, tmp_path / "target")
    with pytest.raises(
        ValueError, match=rf"^prune: {family}: .*{message}.*; use a smaller model of the family"
    ) as caught:
        depth_prune(tmp_path / "target", 3, tmp_path / "proxy")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("keep", [0, 3])
def test_a_wrong_number_of_layers_is_an_error(keep, saved, tmp_path):
    with pytest.raises(ValueError, match=f"prune.keep_layers={keep}.*keep 1 to 2"):
        depth_prune(saved("llama"), keep, tmp_path / "proxy")


def test_an_existing_folder_is_kept(saved, tmp_path):
    (tmp_path / "proxy").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        depth_prune(saved("llama"), 1, tmp_path / "proxy")
