"""TIES-merging (Yadav et al., arXiv 2306.01708, algorithm 1): trim, elect a sign, take the mean of those that agree.

The paper keeps the largest 20 % of a dense change. A delta is sparse already, so what is kept is a share of its own entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trace_dist.bank.composition.changes import composed
from trace_dist.bank.delta import Delta, extract_delta
from trace_dist.config.checks import Section, check
from trace_dist.sharding.base import ShardedModel

label = "TIES-merging"


@dataclass(frozen=True)
class Options(Section):
    """Of ``ties``."""

    section: ClassVar[str] = "composition.options"

    keep: float = 1.0
    """Share of each delta's entries, those that changed most, that takes part, in (0, 1]."""
    weight: float = 1.0
    """Factor of the merged change."""

    def check(self) -> None:
        check(
            0 < self.keep <= 1, f"{self.where}.keep", self.keep, "must lie in (0, 1]", "use for example 0.2"
        )


def compose(deltas: Sequence[Delta], base: ShardedModel, task: str, options: Options) -> Delta:
    """Base + the merged change, on the union of the deltas' masks. Collective.

    Raises:
        ValueError: they are of different base models or shapes.
    """
    least = torch.stack([_threshold(delta, base, options.keep) for delta in deltas])[:, None]

    def rule(name: str, changes: Tensor) -> Tensor:
        changes = changes.where(changes.abs() >= least, 0.0)
        sign = changes.sum(0).sign()
        agree = (changes.sign() == sign) & (sign != 0)
        return options.weight * changes.where(agree, 0.0).sum(0) / agree.sum(0).clamp(min=1)

    return composed(deltas, base, task, rule)


def _threshold(delta: Delta, base: ShardedModel, keep: float) -> Tensor:
    """The least change that takes part: scalar float64."""
    if keep == 1:
        return torch.zeros((), dtype=torch.float64)
    own = extract_delta(base, delta.mask, delta.task).values
    sizes = torch.cat([(delta.values[name].double() - own[name].double()).abs() for name in delta.mask])
    count = max(1, round(keep * len(sizes)))
    return sizes.kthvalue(len(sizes) - count + 1).values
