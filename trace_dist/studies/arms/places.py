"""Arm ``places``: what the target's places alone are worth: one density in all tensors, places as in ``projected``."""

from __future__ import annotations

from trace_dist.studies.arms.projected import Projected
from trace_dist.studies.lab import Case


class Places(Projected):
    """Placement narrow, with flat budgets."""

    label = "flat budgets, Fisher pool"
    warms = reads_proxy = False
    colour = "sky"

    def budgets(self, case: Case) -> dict[float, dict[str, float]]:
        return self.flat_budgets()


ARM = Places
