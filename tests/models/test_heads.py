"""Rows of an attention head, in models of one tower and of several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from trace_dist.masks.ops import layouts_for
from trace_dist.models.heads import head_rows
from trace_dist.models.roles import ParamInfo, describe

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_IMAGE = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_SOUND = {"d_model": 24, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
_GEMMA = {
    "text_config": {**_TEXT, "head_dim": 16, "layer_types": ["full_attention"] * 2},
    "vision_config": _IMAGE,
    "mm_tokens_per_image": 4,
}

TOWERS: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    "gemma3": (AutoModelForCausalLM, _GEMMA, {"text": 16, "vision": 12}),
    "paligemma": (
        AutoModelForImageTextToText,
        {"text_config": {**_TEXT, "model_type": "gemma", "head_dim": 16}, "vision_config": _IMAGE},
        {"text": 16, "vision": 12},
    ),
    "llava": (
        AutoModelForImageTextToText,
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_IMAGE, "model_type": "clip_vision_model"},
        },
        {"text": 8, "vision": 12},
    ),
    "idefics3": (
        AutoModelForImageTextToText,
        {"text_config": {**_TEXT, "model_type": "llama"}, "vision_config": _IMAGE},
        {"text": 8, "vision": 12},
    ),
    "mllama": (
        AutoModelForImageTextToText,
        {
            "text_config": {**_TEXT, "cross_attention_layers": [1]},
            "vision_config": {
                **_IMAGE,
                "attention_heads": 2,
                "num_global_layers": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 48,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
        },
        {"text": 8, "vision": 12},
    ),
    "qwen2_vl": (
        AutoModelForImageTextToText,
        {
            "text_config": _TEXT,
            "vision_config": {"depth": 1, "embed_dim": 24, "num_heads": 2, "hidden_size": 32},
        },
        {"text": 8},
    ),
    "qwen2_audio": (
        AutoModelForMultimodalLM,
        {"text_config": {**_TEXT, "model_type": "qwen2"}, "audio_config": _SOUND},
        {"text": 8, "audio": 12},
    ),
}


def build(family: str) -> Any:
    auto, options, _ = TOWERS[family]
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(family, **options))


@pytest.mark.parametrize("family", TOWERS)
def test_every_tower_has_its_own_head_size(family: str) -> None:
    model = build(family)
    infos = describe(model)
    layouts = layouts_for(model, "head", 8, "linear")
    found = {
        (infos[name].tower, layout.unit // layout.cols)
        for name, layout in layouts.items()
        if infos[name].role in ("q", "k", "v")
    }
    assert found == set(TOWERS[family][2].items())


@pytest.mark.parametrize("granularity", ["element", "block", "row", "column", "tensor"])
@pytest.mark.parametrize("family", TOWERS)
def test_other_granularities_ask_for_no_head_size(family: str, granularity: str, monkeypatch) -> None:
    def never(*_: Any) -> int:
        raise AssertionError("asked for the size of a head")

    monkeypatch.setattr("trace_dist.masks.layouts.head_rows", never)
    assert layouts_for(build(family), granularity, 8, "linear")


def rows_of(model: nn.Module) -> dict[str, int | None]:
    return {info.role: head_rows(model, info) for info in describe(model).values()}


def test_models_of_one_tower(make_model) -> None:
    others = {"o": None, "gate": None, "up": None, "down": None, "embed": None, "norm": None}
    assert rows_of(make_model("gemma3_text")) == {"q": 8, "k": 8, "v": 8, **others}
    gpt2 = rows_of(make_model("gpt2"))
    assert gpt2["qkv"] is None


def test_keys_and_values_of_different_sizes() -> None:
    """Heads of linear attention are not those of the layers with full attention, which the config describes."""
    config = AutoConfig.for_model(
        "olmo_hybrid",
        **{**_TEXT, "num_key_value_heads": 4},
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=6,
        linear_value_head_dim=12,
        layer_types=["linear_attention", "full_attention"],
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    infos = describe(model)
    rows = {(info.layer, info.role): head_rows(model, info) for info in infos.values() if info.role in "qkv"}
    assert rows == {(0, "q"): 6, (0, "k"): 6, (0, "v"): 12, (1, "q"): 8, (1, "k"): 8, (1, "v"): 8}


def test_what_the_attention_module_does_not_say_its_config_does(make_model) -> None:
    model = make_model("qwen2")
    for layer in model.model.layers:
        del layer.self_attn.head_dim, layer.self_attn.config
    assert rows_of(model)["q"] == 12


def test_an_unknown_head_size_is_refused_by_name(make_model) -> None:
    model = make_model("qwen2")
    info = ParamInfo("model.layers.0.self_attn.k_proj.weight", (13, 36), "k", 0, 0.0)
    with pytest.raises(
        ValueError, match=r"k_proj.weight has 13 rows, not a multiple of the head size 12.*'row'"
    ):
        head_rows(model, info)
    # An encoder that says nothing of itself does not take the text model's size.
    model.vision_tower = nn.ModuleDict({"q_proj": nn.Linear(36, 36)})
    info = describe(model)["vision_tower.q_proj.weight"]
    with pytest.raises(ValueError, match=r"vision_tower.q_proj.weight has 36 rows, no head size is known"):
        head_rows(model, info)
