"""How many rows of a query, key or value weight belong to one attention head.

Families name it in many ways, and models of several towers (text, image, sound) have several sizes. The attention module that
holds the weight knows best; where it does not say, the config of its tower does. The text model's size is never taken for another
tower.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trace_dist.models.roles import ParamInfo, Role, tower_of

_COMMON = ("head_dim", "attention_head_size", "head_size", "dim_per_head", "attention_head_dim")
_NAMES: dict[Role, tuple[str, ...]] = {
    "q": ("qk_head_dim", "head_k_dim", *_COMMON),
    "k": ("qk_head_dim", "head_k_dim", *_COMMON),
    "v": ("v_head_dim", "head_v_dim", "values_head_dim", *_COMMON),
}


def head_rows(model: nn.Module, info: ParamInfo) -> int | None:
    """Rows of one attention head in a q, k or v weight; None for other roles.

    Args:
        model: the model that holds the parameter.
        info: the parameter.

    Raises:
        ValueError: neither the attention module nor its tower's config says how long a head is, or the weight's rows are not
            a multiple of it.
    """
    if info.role not in _NAMES:
        return None
    rows = _from_modules(model, info)
    if rows is None or info.shape[0] % rows:
        known = "no head size is known for it" if rows is None else f"not a multiple of the head size {rows}"
        raise ValueError(
            f"mask.granularity='head': {info.name} has {info.shape[0]} rows, {known}; use granularity 'row'"
        )
    return rows


def _from_modules(model: nn.Module, info: ParamInfo) -> int | None:
    """What the innermost module around the weight, within its tower, says: its own attribute, else its config's."""
    path = info.name.split(".")[:-2]
    while tower_of(".".join([*path, "weight"])) == info.tower:
        module = model.get_submodule(".".join(path))
        rows = _size_in(vars(module), _NAMES[info.role])
        config = getattr(module, "config", None)
        if rows is None and config is not None:
            rows = _from_config(config if path else config.get_text_config(), info.role)
        if rows is not None or not path:
            return rows
        path.pop()
    return None


def _from_config(config: Any, role: Role) -> int | None:
    values = config.to_dict()  # attributes that differ between layers cannot be asked for
    rows = _size_in(values, _NAMES[role])
    if rows is not None:
        return rows
    names = {**{name: name for name in ("hidden_size", "num_attention_heads")}, **config.attribute_map}
    hidden, heads = (values.get(names[name]) for name in ("hidden_size", "num_attention_heads"))
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _size_in(values: dict[str, Any], names: tuple[str, ...]) -> int | None:
    found = (values.get(name) for name in names)
    return next((size for size in found if type(size) is int and size > 0), None)
