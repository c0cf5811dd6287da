"""Arm ``probed_like_trace``: as ``probed``, as many entries as have the memory of TRACE's whole tensors.

A trained entry keeps two moments and a gradient in fp32, and an fp32 master copy of a weight in bfloat16; one that is chosen by
itself keeps its index beside them (docs/how-it-works.md, Memory).
"""

from __future__ import annotations

from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import compete
from trace_dist.probe.importance import unit_importance
from trace_dist.studies.arms.trace import Trace
from trace_dist.studies.lab import Case

INDEX_BYTES = 4


class ProbedLikeTrace(Trace):
    """Score l2_fisher on the target, at the memory of ``trace``."""

    label = "probed on the target, TRACE's memory"
    colour = "blue"

    def masks(self, case: Case) -> dict[float | None, Mask]:
        lab = self.lab
        scores = unit_importance(self.probes.target(case), lab.layouts, "l2_fisher")
        (whole,) = super().masks(case).values()
        entry = 16 if lab.cfg.target.dtype == "bfloat16" else 12
        density = whole.density * entry / (entry + INDEX_BYTES)
        return {None: compete(lab.layouts, lab.cfg.mask.granularity, density, lambda name, _: scores[name])}


ARM = ProbedLikeTrace
