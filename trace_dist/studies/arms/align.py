"""Arm ``align``: the proxy's budgets; its entries go where activations are alike, so that any sibling's may."""

from __future__ import annotations

from dataclasses import replace

from trace_dist.masks.mask import Mask
from trace_dist.projection.site import Shown, Site
from trace_dist.studies.arm import Placed
from trace_dist.studies.lab import Case, on_device


class Align(Placed):
    """Placement align."""

    label = "the proxy's entries, by activations"
    warms = reads_proxy = True
    colour = "sky"
    placement = "align"

    def masks(self, case: Case) -> dict[float | None, Mask]:
        with on_device(self.lab.small.module):
            return super().masks(case)

    def _site(self, case: Case, budgets: dict[str, float]) -> Site:
        lab, site = self.lab, super()._site(case, budgets)
        same = lab.small.bench.tokenizer.get_vocab() == lab.setting.bench.tokenizer.get_vocab()
        shown = Shown(self.proxy_scores(case), lab.small.layouts, None, lab.small.module if same else None)
        return replace(site, shown=shown)


ARM = Align
