"""DARE (Yu et al., arXiv 2311.03099, section 3.1): drop entries of each change at random, rescale what is left, add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trace_dist.bank.composition.changes import composed
from trace_dist.bank.delta import Delta
from trace_dist.config.checks import Section, check
from trace_dist.masks.ops import tensor_seed
from trace_dist.sharding.base import ShardedModel

label = "DARE"


@dataclass(frozen=True)
class Options(Section):
    """Of ``dare``."""

    section: ClassVar[str] = "composition.options"

    drop: float = 0.5
    """Share of each delta's entries that is dropped, in [0, 1); the others are divided by what is left."""
    weight: float = 1.0
    """Factor of the sum."""
    seed: int = 0
    """Of what is dropped."""

    def check(self) -> None:
        check(
            0 <= self.drop < 1, f"{self.where}.drop", self.drop, "must lie in [0, 1)", "use for example 0.5"
        )


def compose(deltas: Sequence[Delta], base: ShardedModel, task: str, options: Options) -> Delta:
    """Base + the sum of what is left of the changes, on the union of the deltas' masks. Collective.

    Raises:
        ValueError: they are of different base models or shapes.
    """

    def rule(name: str, changes: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(tensor_seed(options.seed, name))
        left = torch.rand(changes.shape, generator=generator) >= options.drop
        return options.weight / (1 - options.drop) * changes.where(left, 0.0).sum(0)

    return composed(deltas, base, task, rule)
