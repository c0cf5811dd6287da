"""Arm ``random``: random entries, as many in every tensor as its size allows."""

from __future__ import annotations

from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import random_mask, tensor_seed
from trace_dist.studies.arm import Masked
from trace_dist.studies.lab import Case


class Random(Masked):
    """Random masks; those of one task and seed contain each other."""

    label = "random"
    colour = "grey"

    def masks(self, case: Case) -> dict[float | None, Mask]:
        lab, kind = self.lab, self.lab.cfg.mask.granularity
        # each task has its own: the luck of one mask would be that of the reference on all tasks
        seed = tensor_seed(lab.cfg.seed + case.seed, case.task)
        return {density: random_mask(lab.layouts, kind, density, seed) for density in lab.study.densities}


ARM = Random
