"""Which channels, heads and neurons a narrower copy of a model keeps, by what the weights alone say.

- A channel of the residual stream: the sum of its squared weights in all tensors that read or write it, each over the tensor's
  mean square, so that large tensors do not outvote small ones.
- A neuron of the MLP: the product of the norms of its rows of gate and up and its column of down. Scaling one of them up and
  another down changes neither the function nor the product.
- An attention head: ``|q| |k| + |v| |o|``, norms of its rows (of ``o`` its columns). Query heads that share a key head go
  together, and count together, where that gives the wanted number; otherwise each group gives up as many.

Norms of weights are a cheap guess; measured activations would be a better one, and need the target in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trace_dist.models.architecture import stated
from trace_dist.models.axes import axes_of
from trace_dist.models.roles import ParamInfo, Role

Read = Callable[[str], Tensor]
"""Parameter -> its values."""


@dataclass(frozen=True)
class Widths:
    """What a narrower copy keeps; None for all.

    Attributes:
        hidden: channels of the residual stream.
        heads: query heads of each layer.
        intermediate: neurons of the MLP of each layer.
    """

    hidden: int | None = None
    heads: int | None = None
    intermediate: int | None = None

    def __bool__(self) -> bool:
        return any(each is not None for each in (self.hidden, self.heads, self.intermediate))


@dataclass(frozen=True)
class Heads:
    """The attention of a model.

    Attributes:
        queries, keys: heads of a layer.
        kept_queries, kept_keys: of the copy.
    """

    queries: int
    keys: int
    kept_queries: int
    kept_keys: int

    @classmethod
    def cut(cls, queries: int, keys: int, kept: int) -> Heads:
        """As whole groups of query heads where they give the number, else the same number of each group.

        Raises:
            ValueError: neither gives it.
        """
        group = queries // keys
        if not 1 <= kept <= queries or (kept % group and kept % keys):
            ways = sorted({n for n in range(1, queries + 1) if n % group == 0 or n % keys == 0})
            raise ValueError(
                f"prune.keep_heads={kept}: {queries} query heads share {keys} key and value heads, so whole groups of {group} "
                f"can go, or as many of each group; keep one of {', '.join(map(str, ways))}"
            )
        return cls(queries, keys, kept, keys if kept % group else kept // group)


def best(scores: Tensor, count: int) -> list[int]:
    """Indices of the largest scores, rising; ties go to the lower index."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def channel_importance(infos: Mapping[str, ParamInfo], read: Read, hidden: int) -> Tensor:
    """Of each channel of the residual stream: [hidden] fp64."""
    found = torch.zeros(hidden, dtype=torch.float64)
    for name, info in infos.items():
        for dim, axis in enumerate(axes_of(name, len(info.shape))):
            if (
                axis == "hidden"
                and info.shape[dim] == hidden
                and info.tower == "text"
                and len(info.shape) == 2
            ):
                squares = read(name).double().square()
                found += squares.sum(1 - dim) / squares.mean().clamp_min(1e-30)
    return found


def neuron_importance(layer: Mapping[Role, str], read: Read) -> Tensor:
    """Of each neuron of one layer's MLP: [intermediate] fp64."""
    norms = [read(layer[role]).double().norm(dim=1) for role in ("gate", "up") if role in layer]
    return torch.stack([*norms, read(layer["down"]).double().norm(dim=0)]).prod(0)


def kept_heads(
    layer: Mapping[Role, str], read: Read, heads: Heads, rows: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    """Which query heads and which key heads of one layer are kept.

    Args:
        layer: role -> parameter.
        read: its values.
        heads: how many there are, and are kept.
        rows: role -> rows of one head.
    """
    norms = {role: _head_norms(read(layer[role]), rows[role]) for role in ("q", "k", "v")}
    norms["o"] = _head_norms(read(layer["o"]).T, rows["v"])
    group = heads.queries // heads.keys
    shared = {role: norms[role].repeat_interleave(group) for role in ("k", "v")}
    scores = norms["q"] * shared["k"] + shared["v"] * norms["o"]
    if heads.kept_queries == heads.kept_keys * group:
        keys = best(scores.view(heads.keys, group).sum(1), heads.kept_keys)
        return [key * group + i for key in keys for i in range(group)], keys
    each = heads.kept_queries // heads.keys
    queries = [key * group + i for key in range(heads.keys) for i in best(scores.view(-1, group)[key], each)]
    return queries, list(range(heads.keys))


def _head_norms(weight: Tensor, rows: int) -> Tensor:
    return weight.double().reshape(-1, rows * weight.shape[1]).norm(dim=1)


def narrowed(text: Any, widths: Widths, heads: Heads | None, rows: Mapping[str, int]) -> dict[str, Any]:
    """The entries of a text config that a narrower copy changes."""
    names = text.attribute_map
    values: dict[str, Any] = {}
    if widths.hidden is not None:
        values[names.get("hidden_size", "hidden_size")] = widths.hidden
    if widths.intermediate is not None:
        values[names.get("intermediate_size", "intermediate_size")] = widths.intermediate
    if heads is not None:
        values[names.get("num_attention_heads", "num_attention_heads")] = heads.kept_queries
        if stated(text, "num_key_value_heads") is not None:
            values[names.get("num_key_value_heads", "num_key_value_heads")] = heads.kept_keys
    if rows and (widths.hidden is not None or heads is not None):
        # Otherwise it would follow from hidden size and number of heads.
        values[names.get("head_dim", "head_dim")] = rows["q"]
    return values
