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


class _FusedAttention(torch.autograd.Function):
    """Shapes: q [batch, heads, length, dim]; k and v may have fewer heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        shape = (*q.shape[:-1], v.shape[-1])
        order = sorted(range(4), key=q.stride, reverse=True)  # the output lies in memory as the queries do
        out = q.new_empty([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(4)])
        log_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    return _FusedAttention.apply(query, key, value, attn_mask)


def replace_attention() -> Callable[[], None]:
    """Put the stand-in in the place of torch's function; returns a function that undoes it."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attend  # type: ignore[assignment]

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
