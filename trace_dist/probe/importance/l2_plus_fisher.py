"""Importance l2_plus_fisher: update and gradient, each on a scale from 0 to 1 over the whole model, in equal shares.

    1/2 minmax(rms of the update over the unit) + 1/2 minmax(mean squared gradient over the unit)

as TRACE's code weighs whole tensors (arXiv 2605.31025). Min and max are over the units of all tensors; what is the same
everywhere counts 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

label = "update plus mean squared gradient, each between 0 and 1"
uses_update = True
parts = ("l2", "fisher")


def combine(scores: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Scores of all units from those of the two parts, each parameter -> [num_units] fp32."""
    update, root = scores
    squares = {name: values.double().square() for name, values in root.items()}
    first, second = _scaled(update), _scaled(squares)
    return {name: (0.5 * first[name] + 0.5 * second[name]).float() for name in update}


def _scaled(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Between 0 and 1 over all tensors, fp64."""
    least = min(float(each.min()) for each in values.values())
    span = max(float(each.max()) for each in values.values()) - least
    if span == 0:
        return {name: torch.zeros_like(each, dtype=torch.float64) for name, each in values.items()}
    return {name: (each.double() - least) / span for name, each in values.items()}
