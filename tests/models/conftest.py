"""Small models of many families, with sizes that nothing divides (hidden 36, 3 heads, vocabulary 101)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_LLAMA_LIKE = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "vocab_size": 101,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Grouped matrix products want rows of a multiple of 16 bytes, in bf16 too.
_EXPERTS = {
    **_LLAMA_LIKE,
    "hidden_size": 40,
    "head_dim": 8,
    "num_key_value_heads": 1,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
}
_GPT = {"n_embd": 36, "n_layer": 2, "n_head": 3, "vocab_size": 101, "bos_token_id": 1, "eos_token_id": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen2": {**_LLAMA_LIKE, "num_key_value_heads": 1},
    "gemma3_text": {**_LLAMA_LIKE, "num_key_value_heads": 1, "head_dim": 8},
    "gpt_neox": _LLAMA_LIKE,
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "opt": {
        **{key: value for key, value in _LLAMA_LIKE.items() if key != "intermediate_size"},
        "ffn_dim": 50,
        "word_embed_proj_dim": 20,
        "max_position_embeddings": 64,
    },
    "stablelm": {**_LLAMA_LIKE, "num_key_value_heads": 3},
    "bitnet": {**_LLAMA_LIKE, "num_key_value_heads": 3, "head_dim": 12},
    "mixtral": {**_EXPERTS, "num_local_experts": 3},
    "jetmoe": {
        **_EXPERTS,
        "kv_channels": 8,
        "num_local_experts": 3,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 22},
}


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """``make_model(family, seed=0, **changes)``: a model in which norms and biases are random too."""

    def make(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
        config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for param in model.parameters():
                param.data.normal_(std=0.1)
        return model.eval()

    return make


@pytest.fixture
def saved(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[..., Path]:
    """``saved(family, **changes)``: the folder of such a model, in several files where it is large."""

    def save(family: str, **changes: Any) -> Path:
        folder = tmp_path / family
        make_model(family, **changes).save_pretrained(folder, max_shard_size="40KB")
        return folder

    return save
