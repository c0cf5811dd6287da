"""Roles, depths, maskable parameters and head layouts over the families."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from trace_dist.models import roles
from trace_dist.models.roles import describe, full_shape, maskable

# Role of each parameter: inside layers keyed by the name behind the layer's index, outside by the whole name.
_LLAMA = {
    "model.embed_tokens.weight": "embed",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "o",
    "input_layernorm.weight": "norm",
    "post_attention_layernorm.weight": "norm",
    "model.norm.weight": "norm",
}
_MLP = {"mlp.gate_proj.weight": "gate", "mlp.up_proj.weight": "up", "mlp.down_proj.weight": "down"}
_HEAD = {"lm_head.weight": "head"}
_EXPERTS = {
    "mlp.gate.weight": "other",
    "mlp.experts.gate_up_proj": "gate_up",
    "mlp.experts.down_proj": "down",
}
_QKV_BIAS = {f"self_attn.{x}_proj.bias": "bias" for x in "qkv"}
_LN = {"weight": "norm", "bias": "norm"}

EXPECTED: dict[str, dict[str, str]] = {
    "llama": {**_LLAMA, **_MLP},
    "qwen2": {**_LLAMA, **_MLP, **_HEAD, **_QKV_BIAS},
    "gemma3_text": {
        **_LLAMA,
        **_MLP,
        **{f"{name}.weight": "norm" for name in ("self_attn.q_norm", "self_attn.k_norm")},
        **{f"{name}_feedforward_layernorm.weight": "norm" for name in ("pre", "post")},
    },
    "gpt_neox": {
        "gpt_neox.embed_in.weight": "embed",
        "lm_head.weight": "head",
        **{
            f"{name}_layernorm.{leaf}": role
            for name in ("input", "post_attention")
            for leaf, role in _LN.items()
        },
        **{f"gpt_neox.final_layer_norm.{leaf}": role for leaf, role in _LN.items()},
        "attention.query_key_value.weight": "qkv",
        "attention.query_key_value.bias": "bias",
        "attention.dense.weight": "o",
        "attention.dense.bias": "bias",
        "mlp.dense_h_to_4h.weight": "up",
        "mlp.dense_h_to_4h.bias": "bias",
        "mlp.dense_4h_to_h.weight": "down",
        "mlp.dense_4h_to_h.bias": "bias",
    },
    "gpt2": {
        "transformer.wte.weight": "embed",
        "transformer.wpe.weight": "other",
        **{
            f"{name}.{leaf}": role
            for name in ("ln_1", "ln_2", "transformer.ln_f")
            for leaf, role in _LN.items()
        },
        "attn.c_attn.weight": "qkv",
        "attn.c_attn.bias": "bias",
        "attn.c_proj.weight": "o",
        "attn.c_proj.bias": "bias",
        "mlp.c_fc.weight": "up",
        "mlp.c_fc.bias": "bias",
        "mlp.c_proj.weight": "down",
        "mlp.c_proj.bias": "bias",
    },
    "opt": {
        "model.decoder.embed_tokens.weight": "embed",
        "model.decoder.embed_positions.weight": "other",
        "model.decoder.project_in.weight": "other",
        "model.decoder.project_out.weight": "other",
        **{f"self_attn.{x}_proj.weight": x for x in "qkv"},
        **_QKV_BIAS,
        "self_attn.out_proj.weight": "o",
        "self_attn.out_proj.bias": "bias",
        "fc1.weight": "up",
        "fc1.bias": "bias",
        "fc2.weight": "down",
        "fc2.bias": "bias",
        **{
            f"{name}.{leaf}": role
            for name in ("self_attn_layer_norm", "final_layer_norm", "model.decoder.final_layer_norm")
            for leaf, role in _LN.items()
        },
    },
    "mixtral": {**_LLAMA, **_HEAD, **_EXPERTS},
    "jetmoe": {
        "model.embed_tokens.weight": "embed",
        **_HEAD,
        "input_layernorm.weight": "norm",
        "post_attention_layernorm.weight": "norm",
        "model.norm.weight": "norm",
        "self_attention.kv_proj.weight": "other",
        **{
            f"{part}.{name}": role
            for part, ends in (("mlp", ("gate_up", "down")), ("self_attention.experts", ("q", "o")))
            for name, role in (
                ("bias", "bias"),
                ("router.layer.weight", "other"),
                ("input_linear.weight", ends[0]),
                ("output_linear.weight", ends[1]),
            )
        },
    },
    "qwen2_moe": {
        **_LLAMA,
        **_HEAD,
        **_QKV_BIAS,
        **_EXPERTS,
        "mlp.shared_expert.gate_proj.weight": "gate",
        "mlp.shared_expert.up_proj.weight": "up",
        "mlp.shared_expert.down_proj.weight": "down",
        "mlp.shared_expert_gate.weight": "other",
    },
}


@pytest.mark.parametrize("family", EXPECTED)
def test_every_parameter_has_its_role(family, make_model):
    model = make_model(family)
    found: dict[str, set[str]] = {}
    for name, info in describe(model).items():
        inside = "." + str(info.layer) + "."
        short = name if info.layer is None else name.split(inside, 1)[1]
        found.setdefault(short, set()).add(info.role)
        assert info.shape == tuple(model.get_parameter(name).shape)
    assert found == {name: {role} for name, role in EXPECTED[family].items()}


def test_depth_runs_from_zero_to_one(make_model):
    infos = describe(make_model("llama", num_hidden_layers=3))
    depths = {info.layer: info.depth for info in infos.values()}
    assert depths == {None: None, 0: 0.0, 1: 0.5, 2: 1.0}
    assert (
        describe(make_model("llama", num_hidden_layers=1))["model.layers.0.mlp.up_proj.weight"].depth == 0.0
    )


def test_tied_parameters_appear_once(make_model):
    assert "lm_head.weight" not in describe(make_model("llama"))
    assert "lm_head.weight" in describe(make_model("llama", tie_word_embeddings=False))


def test_names_and_shapes_are_enough(make_model):
    model = make_model("gpt2")
    assert describe({name: param.shape for name, param in model.named_parameters()}) == describe(model)


def test_full_shape_prefers_the_unsharded_shape():
    param = nn.Parameter(torch.empty(0))
    param.ds_shape = torch.Size([4, 3])
    assert full_shape(param) == (4, 3)
    assert full_shape(nn.Parameter(torch.empty(2, 5))) == (2, 5)


def test_linear_leaves_out_the_head_embeddings_norms_and_biases(make_model):
    for family, count in (("llama", 14), ("qwen2", 14), ("gpt2", 8), ("gpt_neox", 8)):
        model = make_model(family)
        names = maskable(model, "linear")
        infos = describe(model)
        assert len(names) == count
        assert {infos[name].role for name in names} <= {"q", "k", "v", "qkv", "o", "gate", "up", "down"}
        assert names == [name for name in infos if name in names], "not in the model's order"


def test_linear_takes_fused_experts_and_leaves_their_router_out(make_model):
    for family, shared in (("mixtral", 0), ("qwen2_moe", 4)):
        names = maskable(make_model(family), "linear")
        assert len(names) == 2 * (4 + 2 + shared)
        assert "model.layers.1.mlp.experts.gate_up_proj" in names
        assert "model.layers.1.mlp.experts.down_proj" in names
        assert not any(name.endswith("mlp.gate.weight") for name in names)


def test_experts_of_other_names(make_model, monkeypatch, caplog):
    """JetMoE's are known; a model most of which is left out says so, once."""
    model = make_model("jetmoe")
    names = maskable(model, "linear")
    assert {describe(model)[name].role for name in names} == {"gate_up", "down", "q", "o", "other"}
    assert sum(model.get_parameter(name).dim() == 3 for name in names) == 8
    assert not caplog.records
    roles._say_left_out.cache_clear()
    monkeypatch.setattr(roles, "role_of", lambda name: "other")
    for _ in range(2):
        left = set(names) - set(maskable(model, "linear"))
    assert {model.get_parameter(name).dim() for name in left} == {3}
    (record,) = caplog.records
    assert "of JetMoeForCausalLM, parameters such as model.layers.0." in record.getMessage()


def test_experts_that_lie_end_to_end(caplog):
    """DBRX's matrices [num_experts * neurons, hidden] are no linear layers, and most of the model."""
    experts = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 67}
    config = AutoConfig.for_model("dbrx", **sizes, attn_config=attention, ffn_config=experts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    roles._say_left_out.cache_clear()
    assert not any("experts" in name for name in maskable(model, "linear"))
    (record,) = caplog.records
    assert (
        "of DbrxForCausalLM, parameters such as transformer.blocks.0.ffn.experts.mlp." in record.getMessage()
    )


def test_all_and_expressions(make_model):
    model = make_model("qwen2_moe")
    assert maskable(model, "all") == [name for name, _ in model.named_parameters()]
    assert maskable(model, r"experts\.(gate_up|down)_proj$") == [
        f"model.layers.{i}.mlp.experts.{part}" for i in range(2) for part in ("gate_up_proj", "down_proj")
    ]


def test_an_expression_that_matches_nothing_is_an_error(make_model):
    model = make_model("llama")
    with pytest.raises(ValueError, match=r"mask.maskable='nothing'.*such as model.embed_tokens.weight"):
        maskable(model, "nothing")
    with pytest.raises(ValueError, match="not a regular expression"):
        maskable(model, "(")
    with pytest.raises(ValueError, match="matches no parameter"):
        maskable(nn.LayerNorm(4), "linear")


@pytest.mark.parametrize(
    ("name", "role", "tower"),
    [
        ("model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", "q", "vision"),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "up", "vision"),
        ("model.visual.blocks.3.attn.qkv.weight", "qkv", "vision"),
        ("model.visual.blocks.3.attn.proj.weight", "o", "vision"),
        ("model.visual.blocks.3.mlp.linear_fc2.weight", "down", "vision"),
        ("model.visual.patch_embed.proj.weight", "other", "vision"),
        ("git.image_encoder.vision_model.encoder.layers.0.self_attn.out_proj.weight", "o", "vision"),
        ("model.audio_tower.layers.1.fc2.weight", "down", "audio"),
        ("model.embed_tokens_extend.audio_embed.encoder.encoders.0.self_attn.v_proj.weight", "v", "audio"),
        ("model.multi_modal_projector.linear_1.weight", "other", "text"),
        ("model.language_model.layers.0.self_attn.q_proj.weight", "q", "text"),
        ("bert.encoder.layer.0.attention.self.query.weight", "q", "text"),
        ("bert.encoder.layer.0.intermediate.dense.weight", "up", "text"),
        ("bert.encoder.layer.0.output.dense.weight", "down", "text"),
        ("rwkv.blocks.0.feed_forward.key.weight", "other", "text"),
        ("decoder.layers.0.self_attn.k_proj.linear.weight", "k", "text"),
        ("model.layers.0.mlp.Wi.weight", "gate_up", "text"),
        ("model.layers.0.attn.Wo.weight", "o", "text"),
    ],
)
def test_names_of_other_families_and_towers(name, role, tower):
    (info,) = describe({name: (4, 4)}).values()
    assert (info.role, info.tower) == (role, tower)


def test_each_tower_has_its_own_depths():
    shapes = {
        **{f"model.language_model.layers.{i}.mlp.up_proj.weight": (4, 4) for i in range(5)},
        **{f"model.vision_tower.encoder.layers.{i}.mlp.fc1.weight": (4, 4) for i in range(3)},
    }
    depths = [(info.tower, info.depth) for info in describe(shapes).values()]
    assert depths == [*(("text", i / 4) for i in range(5)), *(("vision", i / 2) for i in range(3))]
