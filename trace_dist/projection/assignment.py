"""Which unit of the proxy each unit of the target is like, from the correlations of their activations.

Units are matched one to one by ``scipy.optimize.linear_sum_assignment`` on the absolute correlations (a channel that carries the
opposite sign carries the same); units of the wider model that are left over take the one that they correlate with most. What a
match is worth is its correlation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class Matched:
    """Units of the proxy for those of the target.

    Attributes:
        units: [n_target] int64, units of the proxy.
        worth: [n_target] fp32 in [0, 1].
    """

    units: Tensor
    worth: Tensor


def assigned(likeness: Tensor) -> Matched:
    """The best one-to-one match, and for what is left over the most alike.

    Args:
        likeness: [n_target, n_proxy], at least 0.
    """
    rows, columns = linear_sum_assignment(-likeness.double().numpy())
    units = likeness.argmax(1)
    units[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return Matched(units, likeness.gather(1, units[:, None])[:, 0].clamp(0, 1))


@dataclass(frozen=True)
class Attention:
    """Heads of a layer.

    Attributes:
        queries, keys: how many.
        query_rows, value_rows: rows of a head in the query and key weights, and in the value weight.
    """

    queries: int
    keys: int
    query_rows: int
    value_rows: int


def match_heads(correlation: Tensor, target: Attention, proxy: Attention) -> dict[str, Matched]:
    """Matches of the rows of query, key and value weights, and of the columns of the output weight.

    Groups of query heads that share a key head are matched first, by how alike their heads' outputs are; heads within matched
    groups then; then the values' dimensions, over all matched heads of a group. Rotary positions tie a query's or key's dimension
    to its place, so these go by relative place within the head.

    Args:
        correlation: [queries * value_rows of the target, the same of the proxy].
        target, proxy: their heads.

    Returns:
        ``q``, ``k``, ``v`` and ``o`` -> [rows, of ``o`` columns].
    """
    blocks = correlation.abs().view(target.queries, target.value_rows, proxy.queries, proxy.value_rows)
    heads = blocks.square().mean((1, 3)).sqrt() * (target.value_rows * proxy.value_rows) ** 0.25
    ours, theirs = target.queries // target.keys, proxy.queries // proxy.keys
    groups = assigned(heads.view(target.keys, ours, proxy.keys, theirs).mean((1, 3)))
    queries = torch.zeros(target.queries, dtype=torch.int64)
    values = torch.zeros(target.keys, target.value_rows, dtype=torch.int64)
    worth = torch.zeros(target.keys, target.value_rows)
    for group, other in enumerate(groups.units.tolist()):
        mine, its = slice(group * ours, (group + 1) * ours), slice(other * theirs, (other + 1) * theirs)
        found = assigned(heads[mine, its])
        queries[mine] = found.units + other * theirs
        pairs = [blocks[group * ours + i, :, other * theirs + j] for i, j in enumerate(found.units.tolist())]
        within = assigned(torch.stack(pairs).mean(0))
        values[group], worth[group] = within.units, within.worth
    group_worth = worth.mean(1)
    query_worth = group_worth.repeat_interleave(ours)
    return {
        "q": _by_place(queries, query_worth, target.query_rows, proxy.query_rows),
        "k": _by_place(groups.units, group_worth, target.query_rows, proxy.query_rows),
        "v": Matched((groups.units[:, None] * proxy.value_rows + values).flatten(), worth.flatten()),
        "o": Matched(
            (queries[:, None] * proxy.value_rows + values.repeat_interleave(ours, 0)).flatten(),
            worth.repeat_interleave(ours, 0).flatten(),
        ),
    }


def _by_place(heads: Tensor, worth: Tensor, rows: int, proxy_rows: int) -> Matched:
    """Rows of matched heads: each at its relative place in the head."""
    places = torch.arange(rows) * proxy_rows // rows
    return Matched((heads[:, None] * proxy_rows + places).flatten(), worth.repeat_interleave(rows))
