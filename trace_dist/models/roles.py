"""What each parameter of a causal LM does (role, tower, layer, relative depth) and which ones a mask may cover.

Roles come from names alone, so that a checkpoint's header is enough. Known are the names of Llama, Qwen,
Gemma, Phi, GPT-NeoX, GPT-2, GPT-J, OPT, BLOOM, Falcon, MPT, Mixtral, JetMoE, of models built like them and of their image and
sound encoders (CLIP, SigLIP, the Qwen-VL and Whisper kinds). Position tables, routers, state space layers, projections between
towers and low-rank attention projections (DeepSeek) are ``other``.

[Note: weight layout] A linear layer's weight is [out_features, in_features]: a row is one output neuron. The
Conv1D of GPT-2 stores [in_features, out_features] and fused experts [num_experts, ...], in the same roles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache as once
from math import prod
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trace_dist.models.nf4 import NF4Linear, named_weights
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

Role = Literal[
    "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "embed", "head", "norm", "bias", "other"
]  # fmt: skip

Tower = Literal["text", "vision", "audio"]

_ROLE_OF_MODULE: dict[str, Role] = {
    **dict.fromkeys(("q_proj", "query_proj", "wq", "Wq", "q_lin", "linear_q", "project_q"), "q"),
    **dict.fromkeys(("k_proj", "key_proj", "wk", "Wk", "k_lin", "linear_k", "project_k"), "k"),
    **dict.fromkeys(("v_proj", "value_proj", "wv", "Wv", "v_lin", "linear_v", "project_v"), "v"),
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "W_pack"), "qkv"),
    **dict.fromkeys(("o_proj", "out_proj", "wo", "out_lin", "attention_out"), "o"),
    **dict.fromkeys(("gate_proj", "w1"), "gate"),
    **dict.fromkeys(
        ("up_proj", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "linear_fc1", "lin1", "intermediate"), "up"
    ),
    **dict.fromkeys(("gate_up_proj", "Wi", "input_linear"), "gate_up"),
    **dict.fromkeys(
        ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", "linear_fc2", "lin2", "output_linear"), "down"
    ),
    **dict.fromkeys(("embed_tokens", "wte", "embed_in", "word_embeddings"), "embed"),
    **dict.fromkeys(("lm_head", "embed_out", "output_projection"), "head"),
}
# Within attention only; elsewhere such names mean other things.
_ROLE_IN_ATTENTION: dict[str, Role] = {
    "query": "q",
    "key": "k",
    "value": "v",
    "input_linear": "q",
    **dict.fromkeys(("proj", "projection", "projection_layer", "linear_out", "output_linear"), "o"),
}
# The output projection of attention and that of the MLP share a name in these families.
_OUTPUT_OF_BLOCK = frozenset({"c_proj", "dense", "Wo"})
_ATTENTION = re.compile(r"attn|attention")
_MUCH = 0.1
"""Share of a model that is not left out without a word."""
_NORM = re.compile(r"norm|^ln(_|\d|$)")
_TOWERS: tuple[tuple[Tower, re.Pattern[str]], ...] = (
    ("audio", re.compile(r"audio|speech|sound|whisper|conformer|voice")),
    ("vision", re.compile(r"vision|visual|image|img|siglip|clip|^vit$|^sam_|_vit$|video|aligner|vqmodel")),
)


@dataclass(frozen=True)
class ParamInfo:
    """One parameter."""

    name: str
    """Name in ``model.named_parameters()``."""
    shape: tuple[int, ...]
    """Full shape, also where the parameter is sharded."""
    role: Role
    """What it does."""
    layer: int | None
    """Index of its decoder layer; None outside the layers."""
    depth: float | None
    """layer / (num_layers - 1) of its own tower, in [0, 1]; 0 in a model of one layer; None outside the layers."""
    tower: Tower = "text"
    """The model of text, or an encoder of another kind of input with its way into the text model."""


def full_shape(param: torch.Tensor | NF4Linear) -> tuple[int, ...]:
    """Shape of the whole parameter; under ZeRO-3 ``param.shape`` is empty and ``ds_shape`` holds it."""
    return tuple(getattr(param, "ds_shape", param.shape))


def role_of(name: str) -> Role:
    """Role of a parameter, from its dotted name."""
    *path, leaf = name.split(".")
    # Otherwise a bare parameter such as `experts.gate_up_proj` or `experts.gate_up_proj_bias`.
    module = path[-1] if path and leaf in ("weight", "bias") else leaf
    if module == "linear" and len(path) > 1:  # inside a wrapper
        path, module = path[:-1], path[-2]
    if _NORM.search(module.lower()):
        return "norm"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    in_attention = any(_ATTENTION.search(part) for part in path[:-1])
    if module in _OUTPUT_OF_BLOCK:
        if in_attention:
            return "o"
        return "up" if "intermediate" in path else "down"
    if in_attention and module in _ROLE_IN_ATTENTION:
        return _ROLE_IN_ATTENTION[module]
    return _ROLE_OF_MODULE.get(module, "other")


def tower_of(name: str) -> Tower:
    """Tower of a parameter, from its dotted name."""
    path = name.lower().split(".")[:-1]
    return next((tower for tower, named in _TOWERS if any(map(named.search, path))), "text")


def _stack_and_layer(name: str) -> tuple[str, int] | None:
    """The list of layers a parameter lies in and its index there: the first number in its path."""
    path = name.split(".")
    for i, part in enumerate(path):
        if part.isdecimal() and i > 0:
            return ".".join(path[:i]), int(part)
    return None


def describe(source: nn.Module | Mapping[str, Sequence[int]]) -> dict[str, ParamInfo]:
    """Every parameter of a model, in the model's order.

    Args:
        source: a module (tied parameters appear once, under their first name; under ``zero.Init`` the
            full shapes are given, and of NF4 layers the logical weight) or a mapping from parameter name to shape.
    """
    if isinstance(source, nn.Module):
        shapes = {name: full_shape(weight) for name, weight in named_weights(source)}
    else:
        shapes = {name: tuple(shape) for name, shape in source.items()}
    places = {name: _stack_and_layer(name) for name in shapes}
    last: dict[str, int] = {}
    for place in places.values():
        if place is not None:
            last[place[0]] = max(last.get(place[0], 0), place[1])
    infos = {}
    for name, shape in shapes.items():
        place = places[name]
        layer = place[1] if place else None
        depth = place[1] / max(last[place[0]], 1) if place else None
        infos[name] = ParamInfo(name, shape, role_of(name), layer, depth, tower_of(name))
    return infos


def maskable(model: nn.Module, spec: str) -> list[str]:
    """Names of the parameters that a mask may cover, in the model's order; tied parameters once.

    Args:
        model: any causal LM, sharded or not.
        spec: ``linear`` (the weights of ``nn.Linear`` and ``Conv1D`` modules except the output head, and those of experts
            fused in one bare parameter [num_experts, ...], which are linear layers in all but name; the router that
            chooses among fused experts is not; that a large part of the model looks like experts of unknown names, and is left
            out, is said once), ``all`` (every floating-point parameter), or a regular expression searched in
            the names.

    Raises:
        ValueError: the expression is malformed, or nothing matches.
    """
    floating = {name: weight for name, weight in named_weights(model) if weight.dtype.is_floating_point}
    if spec == "all":
        names = list(floating)
    elif spec == "linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        excluded = {id(head.weight)} if head is not None else set()
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)} - excluded
        linear |= {id(m) for m in model.modules() if isinstance(m, NF4Linear)}
        names = [
            name for name, param in floating.items() if id(param) in linear or _is_fused_experts(name, param)
        ]
        _check_left_out(floating, set(names), type(model).__name__)
    else:
        try:
            pattern = re.compile(spec)
        except re.error as error:
            raise ValueError(
                f"mask.maskable={spec!r}: not a regular expression ({error}); use 'linear', 'all' or fix it"
            ) from None
        names = [name for name in floating if pattern.search(name)]
    if not names:
        examples = ", ".join(list(floating)[:3]) or "none: the model has no parameters"
        raise ValueError(
            f"mask.maskable={spec!r}: matches no parameter; use 'linear', 'all' or an expression that finds "
            f"names such as {examples}"
        )
    return names


def _is_fused_experts(name: str, param: torch.Tensor | NF4Linear) -> bool:
    """Those of an MLP, and those of attention where the path says so."""
    role = role_of(name)
    known = role in ("gate", "up", "gate_up", "down") or (role in ("q", "o") and "experts" in name.split("."))
    return known and len(full_shape(param)) == 3


def _check_left_out(weights: Mapping[str, torch.Tensor | NF4Linear], taken: set[str], model: str) -> None:
    """Warn where parameters [num_experts, ...] of no known role, or experts that lie end to end in a matrix (DBRX), which no mask
    will cover, are a large part of the model."""
    sizes = {name: prod(full_shape(weight)) for name, weight in weights.items()}
    left = [
        name
        for name, weight in weights.items()
        if name not in taken
        and (
            (len(full_shape(weight)) == 3 and role_of(name) == "other")
            or (len(full_shape(weight)) == 2 and "experts" in name.split("."))
        )
    ]
    share = sum(sizes[name] for name in left) / max(1, sum(sizes.values()))
    if share > _MUCH:
        _say_left_out(model, left[0], round(100 * share))


@once
def _say_left_out(model: str, name: str, percent: int) -> None:
    logger.warning(
        "mask.maskable='linear': leaves out %d %% of %s, parameters such as %s, whose role or layout is not known; name them "
        "in a regular expression to train them",
        percent, model, name,
    )  # fmt: skip
