"""Arm ``trace``: TRACE's masks of whole tensors, a tenth of them by count, chosen on the proxy (continual/methods/trace.py)."""

from __future__ import annotations

from dataclasses import replace

from trace_dist.masks.mask import Mask
from trace_dist.masks.units import UnitLayout
from trace_dist.parts import METHODS
from trace_dist.probe.importance import unit_importance
from trace_dist.projection.project import project_tensors
from trace_dist.studies.arm import Masked
from trace_dist.studies.lab import Case


class Trace(Masked):
    """Root mean square of the update plus mean squared gradient, each between 0 and 1 over all tensors."""

    label = "TRACE, whole tensors"
    warms = reads_proxy = True
    colour = "amber"
    by_density = False

    def masks(self, case: Case) -> dict[float | None, Mask]:
        lab, layouts = self.lab, self.lab.small.layouts
        share = METHODS.options("trace", lab.cfg.continual.options.get("trace", {})).share
        whole = {name: UnitLayout(layout.shape, layout.numel) for name, layout in layouts.items()}
        scores = unit_importance(self.probes.proxy(case), whole, "l2_plus_fisher")
        mask = replace(lab.cfg.mask, granularity="tensor", share_of="tensors", density=share)
        shapes = {name: layout.shape for name, layout in layouts.items()}
        return {None: project_tensors(lab.model, {n: float(s) for n, s in scores.items()}, shapes, mask)}


ARM = Trace
