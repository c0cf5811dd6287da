"""Arm ``identity``: the proxy's budgets; in layers that the proxy keeps its own entries, between them those of its channels."""

from __future__ import annotations

from dataclasses import replace

from trace_dist.continual.proxy import proxy_origin
from trace_dist.projection.site import Shown, Site
from trace_dist.studies.arm import Placed
from trace_dist.studies.lab import Case


class Identity(Placed):
    """Placement identity."""

    label = "the proxy's entries, by position"
    warms = reads_proxy = True
    colour = "green"
    placement = "identity"

    def _site(self, case: Case, budgets: dict[str, float]) -> Site:
        lab, site = self.lab, super()._site(case, budgets)
        origin = proxy_origin(lab.cfg, lab.model, lab.setting.fingerprint)
        return replace(site, shown=Shown(self.proxy_scores(case), lab.small.layouts, origin))


ARM = Identity
