"""What stands for the masked entries of a parameter in the optimizer's group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trace_dist.optim.scaled_gradient import ScaledGradient

if TYPE_CHECKING:
    from trace_dist.sharding.base import ShardedModel
    from trace_dist.sharding.support import Support


class Entries(nn.Parameter):
    """A support's entries, [n]: their shape and gradient, without storage.

    ``grad`` is the buffer in which backward passes add up. Loops that project or clear gradients assign to it: a tensor is copied
    into the buffer, and None empties it, so that the entries are left alone by the next step, as torch does.
    """

    _support: Support
    _buffer: ScaledGradient

    @classmethod
    def of(cls, support: Support, model: ShardedModel) -> Entries:
        """Those of a support of the mask that is attached to a model."""
        entries = cls(support.grad.new_zeros(()).expand(support.runs.num_entries))
        entries._support, entries._buffer = support, ScaledGradient.of(support.grad, model)
        return entries

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        """The compact gradient, [n]: fp32, or fp64 of an fp64 model."""
        return self._buffer

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is self._buffer:
            return
        with torch.no_grad():
            if value is None:
                self._support.grad.zero_()
            else:
                self._support.grad.copy_(value)
        self._support.reached = value is not None
