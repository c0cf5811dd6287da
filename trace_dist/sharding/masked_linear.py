"""A linear layer whose weight gradient never leaves the backward of that layer.

Forward is the plain product ``y = x W^T + b``. Backward returns ``dy W`` for the input and hands the weight gradient to
``deliver``: dense (``dy^T x``) where the mask has scattered entries. Where it is made of whole rows or columns, only those are
computed (``dy[:, rows]^T x``, ``dy^T x[:, columns]``): the dense weight gradient and its FLOPs never exist, and of the input
only the masked columns are kept for backward. The weight itself stays frozen, hence ZeRO-3 and FSDP2 reduce nothing; they
gather it again for the backward as for any frozen layer.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_dist.models.nf4 import NF4Linear

Deliver = Callable[[Tensor], None]


class Part(NamedTuple):
    """Which part of a weight gradient is computed: indices [k] int64 of output and input neurons, None for all."""

    rows: Tensor | None = None
    columns: Tensor | None = None


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        module: nn.Linear | NF4Linear,
        part: Part,
        deliver: Deliver,
    ) -> Tensor:
        ctx.save_for_backward(x if part.columns is None else x[..., part.columns])
        ctx.module, ctx.rows, ctx.deliver = module, part.rows, deliver
        return F.linear(x, module.weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        (x,) = ctx.saved_tensors
        dtype = grad_out.dtype  # under autocast that of the product, not of x and the weight
        flat_grad = grad_out.reshape(-1, grad_out.shape[-1])
        flat_x = x.reshape(-1, x.shape[-1]).to(dtype)
        picked = flat_grad if ctx.rows is None else flat_grad[:, ctx.rows]
        ctx.deliver(picked.T @ flat_x)
        grad_x = (grad_out @ ctx.module.weight.to(dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = flat_grad.sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None, None, None


def patch_linear(
    module: nn.Linear | NF4Linear, anchor: Tensor, part: Part, deliver: Deliver
) -> Callable[[], None]:
    """Run ``module`` through the masked linear function.

    Args:
        module: the layer; its weight is frozen.
        anchor: scalar that requires grad, so that backward runs even for an input that does not.
        part: the part of the weight gradient to compute.
        deliver: receives that part, [rows or out, columns or in], in the dtype of the activations.

    Returns:
        A function that restores the layer.
    """

    def forward(self: nn.Linear | NF4Linear, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return _MaskedLinear.apply(input, self.bias, anchor, self, part, deliver)

    before = module.__dict__.get("forward")  # not None where another library has replaced it
    # A method, not a closure over the layer: a deep copy of the model must run on its own weights.
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]

    def undo() -> None:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]

    return undo
