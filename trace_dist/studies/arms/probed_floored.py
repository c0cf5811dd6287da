"""Arm ``probed_floored``: as ``probed``, but half of the density is every tensor's own (``mask.floor``)."""

from __future__ import annotations

from trace_dist.config.mask import Spread
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import compete
from trace_dist.studies.arms.probed import Probed
from trace_dist.studies.lab import Case

SHARE = 0.5
"""Of the density that no tensor can lose to others."""


class ProbedFloored(Probed):
    """Score l2_fisher, with a floor."""

    label = "probed on the target, half of it in flat budgets"
    colour = "amber"

    def masks(self, case: Case) -> dict[float | None, Mask]:
        lab, scores = self.lab, self.scores(case)
        kind = lab.cfg.mask.granularity
        return {
            density: compete(lab.layouts, kind, density, scores, Spread(floor=SHARE * density))
            for density in lab.study.densities
        }


ARM = ProbedFloored
