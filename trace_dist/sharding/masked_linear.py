"""A linear layer whose weight gradient never leaves the backward of that layer.

Forward is the plain product ``y = x W^T + b``. Backward returns ``dy W`` for the input and hands the weight gradient to
``deliver``: dense (``dy^T x``) where the mask has scattered entries, or the masked rows alone (``dy[:, rows]^T x``) where it is
made of whole rows, so that the dense weight gradient and its FLOPs never exist. The weight itself stays frozen, hence
ZeRO-3 and FSDP2 reduce nothing; they gather it again for the backward as for any frozen layer.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Deliver = Callable[[Tensor], None]


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        module: nn.Linear,
        rows: Tensor | None,
        deliver: Deliver,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.rows, ctx.deliver = module, rows, deliver
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
    module: nn.Linear, anchor: Tensor, rows: Tensor | None, deliver: Deliver
) -> Callable[[], None]:
    """Run ``module`` through the masked linear function.

    Args:
        module: the layer; its weight is frozen.
        anchor: scalar that requires grad, so that backward runs even for an input that does not.
        rows: [k] int64 masked rows, or None for scattered entries.
        deliver: receives [out, in], or [k, in] with rows, in the dtype of the activations.

    Returns:
        A function that restores the layer.
    """

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        return _MaskedLinear.apply(input, self.bias, anchor, self, rows, deliver)

    # A method, not a closure over the layer: a deep copy of the model must run on its own weights.
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]

    def undo() -> None:
        del module.forward

    return undo
