"""Compact gradients to torch's ``GradScaler``, which looks for overflow at the gradients that a rank's optimizer has.

Each rank has those of its own entries. If one alone saw the overflow, it would skip the step for which the others wait, and lower
its scale, with which the loss of its batches would count less from then on. So the look is collective, as at DTensors: what one
rank finds, every rank finds. The scaler does nothing else to gradients but to divide them, and no other tool calls what it
calls. Who asks for their norm, to clip them, is refused on several ranks: it would be that of a rank's part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trace_dist.utils import dist

if TYPE_CHECKING:
    from trace_dist.sharding.base import ShardedModel

CHECK = torch._amp_foreach_non_finite_check_and_unscale_
"""(gradients, found_inf, factor): multiply, and set ``found_inf`` [1] fp32 to 1 where one is infinite or NaN."""
NORMS = (torch._foreach_norm, torch.linalg.vector_norm)
"""What ``torch.nn.utils.clip_grad_norm_`` asks gradients for."""


class ScaledGradient(Tensor):
    """A compact gradient that shares its storage with another tensor; without a norm on several ranks, and otherwise an
    ordinary one to whoever is no ``GradScaler``."""

    _agree: Callable[[Tensor], None]

    @classmethod
    def of(cls, grad: Tensor, model: ShardedModel) -> ScaledGradient:
        """The same gradient, [n], for a scaler.

        Args:
            grad: the compact gradient.
            model: to which its mask is attached.
        """
        scaled: ScaledGradient = grad.as_subclass(cls)
        scaled._agree = partial(_agree, model)
        return scaled

    @classmethod
    def __torch_function__(cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if func in NORMS and dist.world_size() > 1:
            raise ValueError(
                "clip_grad_norm_: the gradients of MaskedAdamW are this rank's part, and so would be their norm; give "
                "max_grad_norm to MaskedAdamW, and read grad_norm after its step"
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if func is CHECK:
            args[0][0]._agree(args[1])
        return found


def _agree(model: ShardedModel, found_inf: Tensor) -> None:
    """Let every rank know of the overflow of one. Collective."""
    if model.comm.max(found_inf).item():
        # The step is skipped: what would not be reset by it must not stay in the next pass.
        model.mark_gradients_spent()
