"""What the dimensions of a decoder layer's weights run over.

The channels of the residual stream are shared by all layers; attention heads and neurons of the MLP are a layer's own. Known are
dense layers with separate query, key and value weights ([Note: weight layout] in models/roles.py); dimensions of anything else
have no name.
"""

from __future__ import annotations

import re
from typing import Literal

from trace_dist.models.roles import Role, role_of

Axis = Literal["hidden", "heads", "kv_heads", "intermediate"]
"""Channels of the residual stream, query heads, key and value heads, neurons of the MLP."""

_MATRICES: dict[Role, tuple[Axis | None, Axis | None]] = {
    "q": ("heads", "hidden"),
    "k": ("kv_heads", "hidden"),
    "v": ("kv_heads", "hidden"),
    "o": ("hidden", "heads"),
    "gate": ("intermediate", "hidden"),
    "up": ("intermediate", "hidden"),
    "down": ("hidden", "intermediate"),
    "embed": (None, "hidden"),
    "head": (None, "hidden"),
}
_NORM_OF_HEADS = re.compile(r"(^|_)[qk](uery|ey)?_?(layer)?_?norm")


def axes_of(name: str, num_dims: int) -> tuple[Axis | None, ...]:
    """What each dimension of a parameter runs over; None where that is not known.

    Args:
        name: of the parameter, dotted.
        num_dims: how many dimensions it has.
    """
    role, path = role_of(name), name.split(".")
    if num_dims == 2:
        return _MATRICES.get(role, (None, None))
    if num_dims == 1 and role == "norm":
        return (None,) if _NORM_OF_HEADS.search(path[-2] if len(path) > 1 else "") else ("hidden",)
    if num_dims == 1 and role == "bias":
        return _MATRICES.get(role_of(f"{name.removesuffix('bias')}weight"), (None, None))[:1]
    return (None,) * num_dims
