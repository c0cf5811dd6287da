"""What runs on the meta device in the place of kernels that a device has.

Attention saves what fused kernels save (q, k, v, the output and fp32 log-sums); on meta tensors torch would choose the unfused
one. Grouped products of experts take any dtype and size, of which torch's meta kernel allows a few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Told = Callable[[int, int], None]
"""Hears of each pass of attention: operations, and bytes that a fused kernel reads and writes."""


class _FusedAttention(torch.autograd.Function):
    """Shapes: q [batch, heads, length, dim]; k and v may have fewer heads."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, share: float, told: Told | None
    ) -> Tensor:
        shape = (*q.shape[:-1], v.shape[-1])
        order = sorted(range(4), key=q.stride, reverse=True)  # the output lies in memory as the queries do
        out = q.new_empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(4)])
        log_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums, *([] if mask is None else [mask]))
        # Two products of [length, dim] with [dim, length], or the other way round; backward takes five.
        product = int(2 * q.shape[:-1].numel() * k.shape[-2] * q.shape[-1] * share)
        ctx.product, ctx.told = product, told
        if told is not None:
            told(2 * product, q.nbytes + k.nbytes + v.nbytes + out.nbytes + log_sums.nbytes)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *_ = ctx.saved_tensors
        if ctx.told is not None:
            ctx.told(5 * ctx.product, 2 * (q.nbytes + k.nbytes + v.nbytes + out.nbytes))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None, None


def replace_attention(told: Told | None = None) -> Callable[[], None]:
    """Put the stand-in in the place of torch's function; returns a function that undoes it.

    Args:
        told: hears of each pass. A causal one computes half of the products.
    """
    original = F.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> Tensor:
        return _FusedAttention.apply(query, key, value, attn_mask, 0.5 if is_causal else 1.0, told)

    F.scaled_dot_product_attention = attend  # type: ignore[assignment]

    def undo() -> None:
        F.scaled_dot_product_attention = original

    return undo


def grouped_product(
    left: Tensor, right: Tensor, ends: Tensor | None = None, _: Any = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The result of ``torch.nn.functional.grouped_mm``, uninitialised.

    Args:
        left: [rows, k], or [groups, rows, k].
        right: [k, columns], or [groups, k, columns].
        ends: [groups] where each group ends in the dimension that lies flat, if one does.
        dtype: of the result; that of ``left`` when None.
    """
    shape = [left.shape[-2], right.shape[-1]]
    if left.dim() == right.dim():
        shape.insert(0, left.shape[0] if ends is None else ends.shape[0])
    return left.new_empty(shape, dtype=dtype)


def grouped_flops(left: Tensor, right: Tensor) -> int:
    """Operations of a grouped product, forward or backward: each row, or each term of a sum, belongs to one group.

    Args:
        left: [rows, k], or [groups, rows, k].
        right: [k, columns], or [groups, k, columns].
    """
    each = 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]
    return each * (left.shape[0] if left.dim() == right.dim() == 3 else 1)
