"""Factors on the learning rate, an own one for every masked entry: this rank's part of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trace_dist.sharding.support import Support


def own_factors(
    scale: Mapping[str, Tensor], supports: Sequence[Support], device: torch.device
) -> dict[str, Tensor]:
    """The factors at a rank's entries, by parameter, where one of them is not 1: [support.runs.num_entries] fp32.

    Args:
        scale: parameter -> [masked entries of the parameter, on all ranks].
        supports: of this rank.
        device: where they are used.

    Raises:
        ValueError: a parameter has no masked entries, another number of them, or a factor outside [0, 1].
    """
    own = {}
    sizes = {support.name: support.num_entries for support in supports}
    for name, factors in scale.items():
        if tuple(factors.shape) != (sizes.get(name, 0),):
            raise ValueError(
                f"scale: {name!r} has {list(factors.shape)} factors and {sizes.get(name, 0)} masked entries; "
                "give one for each entry of the mask"
            )
        if not bool(((factors >= 0) & (factors <= 1)).all()):
            raise ValueError(
                f"scale: a factor of {name!r} lies outside [0, 1]; a factor of 1 changes nothing"
            )
    for support in supports:
        if support.name in scale:
            mine = scale[support.name][support.offset : support.offset + support.runs.num_entries]
            if bool((mine != 1).any()):
                own[support.name] = mine.to(device, torch.float32, copy=True)
    return own
