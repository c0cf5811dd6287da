"""Specificity: how little a task's update direction agrees with other tasks' updates.

    specificity(t) = 1 - max over other tasks s of |cos(u_t, u_s)|

over all maskable parameters, and per tensor (TRACE, arXiv 2605.31025). A single task is fully specific.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Update = Mapping[str, Tensor]


def cosine_matrix(updates: Sequence[Update], names: Sequence[str]) -> Tensor:
    """Cosines between the tasks' updates over the named parameters: [T, T] fp64; 0 where an update is zero."""
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in names:
        stacked = torch.stack([update[name].flatten().double() for update in updates])
        gram += stacked @ stacked.T
    norms = gram.diagonal().sqrt()
    cosine = gram / torch.outer(norms, norms).clamp_min(1e-300)
    cosine.fill_diagonal_(1.0)
    return cosine


def specificity(cosine: Tensor) -> Tensor:
    """1 - the largest absolute cosine with another task: [T] in [0, 1]."""
    others = cosine.abs() - 2 * torch.eye(len(cosine), dtype=cosine.dtype)
    return 1 - others.max(1).values.clamp_min(0).clamp_max(1)


def tensor_specificity(updates: Sequence[Update], names: Sequence[str]) -> list[dict[str, float]]:
    """Per task: parameter -> specificity of its update in that tensor alone."""
    per_name = {name: specificity(cosine_matrix(updates, [name])) for name in names}
    return [{name: float(values[t]) for name, values in per_name.items()} for t in range(len(updates))]
