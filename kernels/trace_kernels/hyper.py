"""Hyper-parameters of an AdamW step and its bias corrections, by step or by age.

[Note: age]
Entries that join a mask late need their own bias correction. The step may then be a tensor of per-entry
ages; the corrections come from two tables computed in float64, so that a tensor full of t equals the number
t bit for bit.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_AGE_TABLE = 1 << 22


@dataclass(frozen=True)
class AdamWHyper:
    """The scalars of one step, checked on construction."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: must be finite and >= 0")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in [0, 1)")

    @property
    def decay(self) -> float:
        """Factor of the weight."""
        return 1 - self.lr * self.weight_decay

    def step_size(self, step: int) -> float:
        """Learning rate over the first moment's bias correction."""
        return self.lr / (1 - self.beta1**step)

    def correction2_sqrt(self, step: int) -> float:
        """Square root of the second moment's bias correction."""
        return (1 - self.beta2**step) ** 0.5

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`step_size` and `correction2_sqrt` of each age, up to the age where both stop changing."""
        return _tables(self, device, dtype)


@functools.lru_cache(maxsize=8)
def _tables(hyper: AdamWHyper, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    correction1, correction2_sqrt = _corrections(hyper.beta1, hyper.beta2)
    return (hyper.lr / correction1).to(device, dtype), correction2_sqrt.to(device, dtype)


@functools.lru_cache(maxsize=8)
def _corrections(beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    # beyond the last row beta^t < 2^-54 and 1 - beta^t is 1 even in float64
    beta = max(beta1, beta2, 0.5)
    num_ages = math.ceil(-54 * math.log(2) / math.log(beta)) + 2
    if num_ages > _MAX_AGE_TABLE:
        raise ValueError(
            f"beta = {beta}: must be at most 0.99999 with per-entry ages; lower it or pass one step"
        )
    # Python's power, not torch's: the scalar path must find the same bits
    correction1 = torch.tensor([1 - beta1**age for age in range(num_ages)], dtype=torch.float64)
    correction2_sqrt = torch.tensor([(1 - beta2**age) ** 0.5 for age in range(num_ages)], dtype=torch.float64)
    return correction1, correction2_sqrt
