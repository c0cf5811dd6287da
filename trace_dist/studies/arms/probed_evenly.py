"""Arm ``probed_evenly``: the places of ``probed`` at one density in all tensors (``mask.scope: tensor``)."""

from __future__ import annotations

from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import place
from trace_dist.studies.arms.probed import Probed
from trace_dist.studies.lab import Case


class ProbedEvenly(Probed):
    """Score l2_fisher, with flat budgets."""

    label = "probed on the target, flat budgets"
    colour = "green"

    def masks(self, case: Case) -> dict[float | None, Mask]:
        lab, scores = self.lab, self.scores(case)
        return {
            density: place(lab.layouts, lab.cfg.mask.granularity, each, scores)
            for density, each in self.flat_budgets().items()
        }


ARM = ProbedEvenly
