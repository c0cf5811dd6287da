"""Arm ``specific``: what the task needs and general data do not; both by probes of the target (probe/importance/specific.py)."""

from __future__ import annotations

from torch import Tensor

from trace_dist.probe.importance import unit_importance
from trace_dist.probe.importance.contrast import Contrast
from trace_dist.studies.arm import Scored
from trace_dist.studies.lab import Case


class Specific(Scored):
    """Importance for the task over that for the general sets."""

    label = "specific to the task"
    colour = "pink"
    score = "l2_fisher"
    warms = False  # the general data's is the last one

    def importance(self, case: Case) -> dict[str, Tensor]:
        own, contrast = super().importance(case), Contrast("specific")
        contrast.add(own)
        contrast.add(unit_importance(self.probes.general(case.seed), self.lab.layouts, self.score))
        return contrast.of(own)


ARM = Specific
