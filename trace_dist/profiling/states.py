"""Counting the bytes of model states, from the tensors that are really there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trace_dist.utils import dist


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors; views of one storage count once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.numel()
    }
    return sum(storages.values())


def bytes_per_param(categories: Mapping[str, Iterable[Tensor]], num_parameters: int) -> dict[str, float]:
    """Bytes over all ranks divided by the model's parameters, for each category. Collective.

    Args:
        categories: category -> the tensors that this rank holds.
        num_parameters: parameters of the whole model.
    """
    local = [tensor_bytes(list(tensors)) for tensors in categories.values()]
    total = dist.sum_over_ranks(torch.tensor(local, dtype=torch.int64, device=dist.local_device()))
    return {name: int(value) / num_parameters for name, value in zip(categories, total, strict=True)}
