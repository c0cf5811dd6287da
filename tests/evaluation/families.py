"""Tiny models of many families: attention, recurrent, hybrid, without a cache, and decoders with learned positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON: dict[str, Any] = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SSM: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "gemma3_text": {
        **WIDE, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bart": {
        "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32,
        "max_position_embeddings": 64, "forced_eos_token_id": None,
    },
    "cpmant": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48,
    },
    "roberta": {**WIDE, "is_decoder": True, "max_position_embeddings": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1,
        "chunk_size": 8,
    },
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
    "recurrent_gemma": {
        **WIDE, "lru_width": 32, "num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]
    },
    "jamba": {
        **WIDE, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 2,
        "use_mamba_kernels": False, "num_experts": 2, "num_key_value_heads": 2,
    },
    "bamba": {**WIDE, **SSM, "attn_layer_indices": [1], "mamba_d_head": 16, "num_key_value_heads": 2},
    "falcon_h1": {**WIDE, **SSM, "mamba_d_ssm": 32, "mamba_d_head": 8, "num_key_value_heads": 2},
    "lfm2": {**WIDE, "layer_types": ["conv", "full_attention"], "num_key_value_heads": 2},
    "minimax": {
        **WIDE, "layer_types": ["linear_attention", "full_attention"], "block_size": 8, "head_dim": 8,
        "num_key_value_heads": 2, "num_local_experts": 2,
    },
    "qwen3_5_text": {
        **WIDE, **LINEAR, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8,
        "num_key_value_heads": 2,
    },
}  # fmt: skip


def tiny(family: str) -> PreTrainedModel:
    """Random weights, large enough that outputs tell prompts apart."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.mul_(3)
    return model
