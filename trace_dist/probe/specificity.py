"""Specificity: how little a task's update direction agrees with other tasks' updates.

    specificity(t) = 1 - max over other tasks s of |cos(u_t, u_s)|

over all maskable parameters, and per tensor (TRACE, arXiv 2605.31025). A single task is fully specific. Updates are compared by
their sketches (bank/sketch.py), so that no dense update outlives its probe, and tasks of earlier runs take part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trace_dist.bank.sketch import Cosines, Sketch, cosines


def cosine_matrix(sketches: Sequence[Sketch]) -> Tensor:
    """Cosines between the tasks' updates: [T, T] fp64; 0 where an update is zero."""
    cosine = torch.stack([cosines(sketch, sketches).total for sketch in sketches])
    cosine.fill_diagonal_(1.0)
    return cosine


def specificity(cosine: Tensor) -> Tensor:
    """1 - the largest absolute cosine with another task: [T] in [0, 1]."""
    others = cosine.abs() - 2 * torch.eye(len(cosine), dtype=cosine.dtype)
    return 1 - others.max(1).values.clamp_min(0).clamp_max(1)


def mean_cosines(own: Sketch, others: Iterable[Sketch]) -> dict[str, float]:
    """Parameter -> mean over other tasks of the signed cosine of the updates in that tensor alone; others are read one at a time.

    Raises:
        ValueError: there are no others, or they are of another proxy.
    """
    sums, count = dict.fromkeys(own.values, 0.0), 0
    for other in others:
        count += 1
        for name, values in cosines(own, [other]).tensors.items():
            sums[name] += float(values[0])
    if not count:
        raise ValueError("specificity: there is no other task to compare with; add one")
    return {name: total / count for name, total in sums.items()}


def tensor_specificity(own: Sketch, others: Sequence[Sketch]) -> dict[str, float]:
    """Parameter -> specificity of a task's update in that tensor alone."""
    found: Cosines = cosines(own, others)
    if not others:
        return dict.fromkeys(found.tensors, 1.0)
    return {name: 1 - min(1.0, float(values.abs().max())) for name, values in found.tensors.items()}
