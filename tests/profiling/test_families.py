"""Estimates over the families of transformers: an answer, or one line that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trace_dist.profiling.estimate import estimate
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.plan import plan

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_SEQ2SEQ = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}

FAMILIES: dict[str, dict[str, Any]] = {
    # A module's output is changed in place.
    "falcon": {**_COMMON, "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False},
    "llama4_text": {**_COMMON, "intermediate_size_mlp": 64, "head_dim": 16, "num_local_experts": 4},
    "roc_bert": {**_COMMON, "is_decoder": True},
    "xlm": {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "n_words": 128, "max_position_embeddings": 64},
    # Sizes depend on which experts the tokens choose.
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "vocab_size": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "jetmoe": {**_COMMON, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "longcat_flash": {
        **_COMMON,
        "num_layers": 1,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "head_dim": 16,
    },
    # Grouped products of sizes and types that not every kernel takes.
    "mixtral": {**_COMMON, "num_local_experts": 4, "intermediate_size": 51},
    # State spaces without any attention, whose caches would ask for a length.
    "jamba": {
        **_COMMON,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "num_experts": 1,
        "mamba_dt_rank": 4,
    },
    "bamba": {**_COMMON, "attn_layer_indices": [], **_MAMBA2},
    "granitemoehybrid": {**_COMMON, "layer_types": ["mamba"] * 2, "num_local_experts": 4, **_MAMBA2},
    "mamba": {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    # Decoders of models with an encoder, of another number of layers.
    "bart": {**_SEQ2SEQ, "vocab_size": 128, "max_position_embeddings": 64},
    "pegasus": {**_SEQ2SEQ, "vocab_size": 128, "max_position_embeddings": 64},
    # Head sizes of no kind, or of several.
    "rwkv": {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 64},
    "gemma3": {
        "text_config": {**_COMMON, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
}


def config_file(folder: Path, family: str, options: dict[str, Any]) -> str:
    """As a user has it: JSON with a model_type, whatever else."""
    file = folder / "config.json"
    file.write_text(json.dumps({"model_type": family, **options}))
    return str(file)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_an_answer(family: str, dtype: Any, tmp_path: Path) -> None:
    model = config_file(tmp_path, family, FAMILIES[family])
    found = estimate(MemorySetup(model, dtype=dtype, world_size=8, sequence_length=16))
    assert found.peak == sum(found.peak_parts.values())
    assert found.between["activations"] > 0


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("t5", {"d_model": 64}, "no causal LM of the family 't5' can be built"),
        (
            "ministral",
            _COMMON,
            "no causal LM of the family 'ministral' can be built from its config .TypeError",
        ),
        ("llama", {**_COMMON, "hidden_size": "many"}, r"no readable config|cannot be built"),
        ("no-such-family", {}, "no readable config"),
        (
            "vit",
            {"architectures": ["ViTForImageClassification"]},
            "a ViTForImageClassification reads no tokens",
        ),
        (
            "reformer",
            {"is_decoder": True, "axial_pos_shape": [4, 8]},
            "a step of the family 'reformer' is not known before one is run .ValueError: .*axial_pos_shape",
        ),
    ],
)
def test_or_one_line_that_says_why_not(
    family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = config_file(tmp_path, family, options)
    with pytest.raises(ValueError, match=message) as caught:
        estimate(MemorySetup(model, sequence_length=16))
    assert str(caught.value).startswith(f"model={model!r}: ")
    assert "\n" not in str(caught.value)


def test_a_plan_leaves_out_what_the_family_cannot_do(tmp_path: Path) -> None:
    options = plan(MemorySetup(config_file(tmp_path, "jetmoe", FAMILIES["jetmoe"]), sequence_length=16), 2.0)
    assert options
    assert not any(option.setup.activation_checkpointing for option in options)
