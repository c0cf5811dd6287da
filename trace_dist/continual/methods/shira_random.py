"""``shira_random``: PEFT's SHiRA (arXiv 2406.13175) on a random mask of each linear layer, task after task on the same mask.

What a mask that knows nothing of the tasks is worth without a bank.

PEFT gives layers of one shape the same mask; here each has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trace_dist.config.checks import check
from trace_dist.continual.methods.adapted import Adapted, linear_layers, rank_for
from trace_dist.continual.methods.options import LowRank, Replayed


@dataclass(frozen=True)
class Options(LowRank, Replayed):
    """Of ``shira_random``; the rank is that of a LoRA with as many parameters."""

    section: ClassVar[str] = "continual.options.shira_random"


class ShiraRandom(Adapted):
    """Sparse adapters on random masks."""

    label = "SHiRA, random mask"
    colour = "grey"

    def config(self, module: Any) -> Any:
        from peft import ShiraConfig  # slow to import, and needed here alone

        # a gate of one output has fewer weights than a LoRA of rank 1
        ranks = {
            name: rows * columns // (rows + columns)
            for name, (rows, columns) in linear_layers(module).items()
            if rows * columns >= rows + columns
        }
        most = min(ranks.values(), default=1)
        rank = self.options.rank or min(most, rank_for(module, self.setting.cfg.mask))
        where, rule = f"continual.options.{self.name}.rank", f"must be at most {most} for this model"
        check(rank <= most, where, rank, rule, "lower it")
        config = ShiraConfig(r=rank, target_modules=list(ranks))
        generator = torch.Generator().manual_seed(self.setting.cfg.seed)
        config.mask_fn = lambda layer, rank, **_: random_mask(layer.weight, rank, generator)
        return config


def random_mask(weight: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """[rows, columns] bool mask of a weight with rank * (rows + columns) random entries."""
    entries = torch.randperm(weight.numel(), generator=generator)[: rank * sum(weight.shape)]
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[entries] = True
    return mask.view(weight.shape).to(weight.device)


METHOD = ShiraRandom
