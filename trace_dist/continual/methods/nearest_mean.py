"""``nearest_mean``: the class whose mean representation under the frozen base is nearest; nothing is trained.

What class-incremental methods on pretrained models must beat (SimpleCIL in PILOT, arXiv 2303.07338).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trace_dist.continual.methods.frozen import Frozen


class NearestMean(Frozen):
    """Nearest class mean by cosine, as SimpleCIL."""

    label = "nearest class mean"
    colour = "grey"

    def add(self, x: Tensor, labels: Tensor) -> None:
        sums = torch.zeros(len(self.classes), x.shape[1], dtype=torch.float64)
        if "sums" in self.sums:
            sums[: len(self.sums["sums"])] = self.sums["sums"]
        # the direction of a mean does not depend on the count
        self.sums["sums"] = sums.index_add(0, labels, x.double())

    def scores(self, x: Tensor) -> Tensor:
        means = torch.nn.functional.normalize(self.sums["sums"])
        return torch.nn.functional.normalize(x.double()) @ means.T


METHOD = NearestMean
