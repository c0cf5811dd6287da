"""Which decoder blocks are simulated, and that they stand for all blocks of the model, kind by kind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, Gemma3TextConfig, LlamaConfig, Qwen3MoeConfig

from trace_dist.models.architecture import empty_model
from trace_dist.models.depth import layer_list
from trace_dist.profiling.simulation import blocks
from trace_dist.profiling.simulation.blocks import FEW, added_up, parts_of

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
CONFIGS: dict[str, Any] = {
    "alike": LlamaConfig(**SMALL, num_hidden_layers=9),
    "dense first": DeepseekV3Config(
        **{**SMALL, **EXPERTS, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        num_hidden_layers=9,
        first_k_dense_replace=3,
    ),
    "every second": Qwen3MoeConfig(
        **SMALL, **EXPERTS, num_experts=4, num_hidden_layers=9, decoder_sparse_step=2
    ),
    "windows": Gemma3TextConfig(
        **SMALL,
        head_dim=16,
        num_hidden_layers=9,
        layer_types=[*["sliding_attention"] * 2, "full_attention"] * 3,
    ),
}
LAYERS = {
    "alike": [(0, 1), (0, 1, 2)],
    "dense first": [(0, 1, 3, 4), (0, 1, 2, 3, 4), (0, 1, 3, 4, 5)],
    "every second": [(0, 1, 2, 3), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5)],
    "windows": [(0, 1, 2, 5), (0, 1, 2, 3, 5), (0, 1, 2, 5, 8)],
}


def whole(config: Any) -> Any:
    return empty_model(config, torch.bfloat16, "model='m'")


def kinds_of(config: Any) -> Counter[tuple[str, ...]]:
    """Class of each part of each block, with its window."""
    module = whole(config)
    path = layer_list(module, config)
    assert path is not None
    found: Counter[tuple[str, ...]] = Counter()
    for block in module.get_submodule(path):
        window = str(getattr(block.self_attn, "is_sliding", None))
        found[(*(type(child).__name__ for child in block.modules()), window)] += 1
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_have_as_many_blocks_of_each_kind_as_the_model(name: str) -> None:
    config = CONFIGS[name]
    parts = parts_of(whole(config), config, "model='m'", fewest=2)
    assert [part.layers for part in parts] == LAYERS[name]
    assert sum(part.weight for part in parts) == 1
    together: Counter[tuple[str, ...]] = Counter()
    for part in parts:
        for kind, count in kinds_of(part.config).items():
            together[kind] += part.weight * count
    assert together == kinds_of(config)
    assert len(together) == (1 if name == "alike" else 2)


def test_a_small_model_is_simulated_whole() -> None:
    config = CONFIGS["dense first"]
    for fewest in (0, 9):
        (part,) = parts_of(whole(config), config, "model='m'", fewest)
        assert (part.layers, part.weight) == (tuple(range(9)), 1)


def test_blocks_that_a_smaller_model_would_not_have_are_never_continued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other(config: Any, kept: Any) -> Any:
        return DeepseekV3Config(
            **{**config.to_dict(), "num_hidden_layers": len(kept), "first_k_dense_replace": 0}
        )

    monkeypatch.setattr(blocks, "shortened", other)
    config = CONFIGS["dense first"]
    (part,) = parts_of(whole(config), config, "model='m'", fewest=2)
    assert len(part.layers) == 9
    many = DeepseekV3Config(**{**config.to_dict(), "num_hidden_layers": FEW + 1})
    message = rf"model='m': its {FEW + 1} decoder blocks \(3 of DeepseekV3DecoderLayer .*DeepseekV3MLP\), 14 of .*DeepseekV3MoE"
    with pytest.raises(ValueError, match=message + rf".*simulate all of them, with blocks {FEW + 1}"):
        parts_of(whole(many), many, "model='m'", fewest=2)
    assert len(parts_of(whole(many), many, "model='m'", fewest=FEW + 1)) == 1


def test_numbers_are_added_up_name_by_name() -> None:
    found = [{"a": 10, "b": {"c": 1.0}}, {"a": 13, "b": {"c": 1.5, "d": 2}}]
    assert added_up(found, [-4, 5]) == {"a": 25, "b": {"c": 3.5, "d": 10}}
