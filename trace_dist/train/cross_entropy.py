"""Cross-entropy that never holds the logits a second time, a few rows after another.

``F.cross_entropy`` of half-precision logits [n, vocabulary] wants an fp32 copy, keeps the log-probabilities in fp32 for backward,
and forms a gradient of each: 12 bytes beside the 2 of every logit, often more than all activations together. Here only the
log-sum of every row is kept; backward recomputes the probabilities and writes the one gradient that the model needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trace_dist.data.encoding import IGNORE

CHUNK_ELEMENTS = 2**22
"""Logits that are upcast at a time: 16 MiB of fp32."""


class _NllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_sums = torch.empty(len(logits), dtype=wide, device=logits.device)
        for rows in _chunks(logits):
            log_sums[rows] = logits[rows].to(wide).logsumexp(1)
        kept = targets != IGNORE
        targets = targets.where(kept, 0)
        ctx.save_for_backward(logits, targets, kept, log_sums)
        picked = logits.gather(1, targets[:, None])[:, 0].to(wide)
        return (log_sums - picked).where(kept, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, targets, kept, log_sums = ctx.saved_tensors
        scale = grads[0] * kept
        grad = torch.empty_like(logits)
        for rows in _chunks(logits):
            chunk = logits[rows].to(log_sums.dtype, copy=True).sub_(log_sums[rows, None]).exp_()
            chunk.scatter_add_(1, targets[rows, None], chunk.new_full((1, 1), -1).expand(len(chunk), 1))
            grad[rows] = chunk.mul_(scale[rows, None])
        return grad, None


def _chunks(logits: Tensor) -> list[slice]:
    num_rows, vocabulary = logits.shape
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def nll_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihood of the labelled rows.

    Args:
        logits: [n, vocabulary], any float dtype.
        targets: [n] int64; -100 where there is no loss.

    Returns:
        Scalar, in nats, fp32 (fp64 for fp64 logits); 0 with gradient when nothing is labelled.
    """
    return _NllSum.apply(logits, targets)
