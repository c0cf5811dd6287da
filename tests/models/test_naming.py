"""Checkpoints whose names or layouts are not the module's, found as ``from_pretrained`` finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from trace_dist.models.loading import load_model
from trace_dist.models.naming import pieces_of
from trace_dist.models.prune import prune

COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    # One of its rules, meant for norms inside attention, finds the last norm too.
    "deepseek_v4": {
        **COMMON, "num_key_value_heads": 1, "n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "q_lora_rank": 16, "qk_rope_head_dim": 4, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2, "index_head_dim": 8,
        "index_n_heads": 2, "index_topk": 4,
    },
    # The convolutions of query, key and value lie apart in its files.
    "olmo_hybrid": {
        **COMMON, "num_key_value_heads": 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
}  # fmt: skip


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_its_pieces_laid_end_to_end(folder: Path) -> None:
    model, stored = load_model(folder), load_file(folder / "model.safetensors")
    pieces = pieces_of(model, stored)
    for name, parameter in model.named_parameters():
        laid = torch.cat([stored[piece].reshape(-1) for piece in pieces[name]])
        assert torch.equal(laid, parameter.reshape(-1)), name


@pytest.mark.parametrize("family", ["olmo_hybrid"])
def test_parts_of_a_tensor_go_with_their_layer(folder: Path, tmp_path: Path) -> None:
    prune(folder, tmp_path / "copy", 2)
    target, copy = load_model(folder).state_dict(), load_model(tmp_path / "copy").state_dict()
    for name, value in copy.items():
        assert torch.equal(value, target[name.replace("layers.1.", "layers.2.")]), name


@pytest.mark.parametrize("family", ["olmo_hybrid"])
def test_a_part_that_is_not_there_is_an_error(folder: Path) -> None:
    model, stored = load_model(folder), load_file(folder / "model.safetensors")
    lacking = next(name for name in stored if "conv1d" in name)
    with pytest.raises(ValueError, match="cannot be read in parts"):
        pieces_of(model, [name for name in stored if name != lacking])
