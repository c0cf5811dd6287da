"""Importance snr: the gradient's signal over its noise, ``|mean g| / std g`` over batches.

The standard deviation is that of ``probe.fisher_batches`` batches: with few of them the score is noisy itself. At least two are
needed; where all batches agree to fp32's last digits, the noise counts as that much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trace_dist.probe.importance.evidence import Evidence

label = "gradient's signal over its noise"
uses_update = False
least_batches = 2


def energy(evidence: Evidence) -> Tensor:
    """``(mean g)^2 / var g`` of each element, fp64; 0 where there is no gradient."""
    signal, second = evidence.gradient.double().square(), evidence.fisher.double()
    noise = (second - signal).clamp(min=torch.finfo(torch.float32).eps * second)
    return torch.where(second > 0, signal / noise.clamp(min=1e-300), torch.zeros_like(signal))
