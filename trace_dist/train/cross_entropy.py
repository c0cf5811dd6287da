"""Cross-entropy that turns the logits into their gradient where they lie, a few rows after another.

``F.cross_entropy`` of half-precision logits [n, vocabulary] wants an fp32 copy, keeps the log-probabilities in fp32 for backward,
and forms a gradient of each: 12 bytes beside the 2 of every logit, often more than all activations together. The gradient is
known as soon as the loss is, up to a factor: it takes the place of the logits during forward, as in Liger Kernel (Hsu et al.,
arXiv 2410.10989, section 3.2), and backward has nothing left to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trace_dist.data.encoding import IGNORE

CHUNK_ELEMENTS = {"cpu": 2**20}
"""Logits that are upcast at a time, by device: what a core's caches hold."""
DEFAULT_CHUNK_ELEMENTS = 2**25
"""On a GPU: 128 MiB in fp32, enough that a chunk's dozen kernels take longer than their launches."""

MOST_CHUNKS: int | None = None
"""After which a loss ends; all when None (``chunks_on_meta``)."""


def rows_at_a_time(logits: Tensor) -> int:
    """How many rows of logits [n, vocabulary] are upcast at a time."""
    return max(1, CHUNK_ELEMENTS.get(logits.device.type, DEFAULT_CHUNK_ELEMENTS) // logits.shape[1])


def chunks(num_rows: int, size: int) -> Iterator[slice]:
    """The rows that are upcast together, one chunk after the other."""
    for start in range(0, num_rows, size)[:MOST_CHUNKS]:
        yield slice(start, start + size)


@contextmanager
def chunks_on_meta(device: str, most: int | None = None) -> Iterator[None]:
    """Let tensors of the meta device be upcast by as many rows as those of a type of device, such as ``cpu``.

    Args:
        device: the type.
        most: chunks after which a loss ends: without values all full ones are alike. All when None.
    """
    global MOST_CHUNKS
    before = dict(CHUNK_ELEMENTS), MOST_CHUNKS
    MOST_CHUNKS = most
    CHUNK_ELEMENTS["meta"] = CHUNK_ELEMENTS.get(device, DEFAULT_CHUNK_ELEMENTS)
    try:
        yield
    finally:
        CHUNK_ELEMENTS.clear()
        CHUNK_ELEMENTS.update(before[0])
        MOST_CHUNKS = before[1]


class GradientInPlace(torch.autograd.Function):
    """A loss whose forward pass saves the gradient of its first argument, the logits; the others have none."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        if grad.device.type != "cpu" or grads[0] != 1:  # a GPU would have to be waited for
            grad.mul_(grads[0])
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


class _NllSum(GradientInPlace):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, scale: float, overwrite: bool) -> Tensor:
        logits = logits.detach()  # the same memory and version, without what autograd knows of views
        wide = torch.promote_types(logits.dtype, torch.float32)
        kept = targets != IGNORE
        targets = targets.where(kept, 0)[:, None]
        weights = (scale * kept.to(wide))[:, None]
        nll = torch.empty_like(weights)
        size = rows_at_a_time(logits)
        buffer = logits.new_empty(min(size, len(logits)), logits.shape[1], dtype=wide)
        for rows in chunks(len(logits), size):
            chunk = buffer[: len(logits[rows])].copy_(logits[rows])
            largest, picked = chunk.amax(1, keepdim=True), chunk.gather(1, targets[rows])
            sums = chunk.sub_(largest).exp_().sum(1, keepdim=True)
            nll[rows] = sums.log() + largest - picked
            if overwrite:
                chunk.mul_(weights[rows] / sums).scatter_add_(1, targets[rows], -weights[rows])
                logits[rows] = chunk
        ctx.save_for_backward(logits)
        return scale * nll[:, 0].where(kept, 0).sum()


def nll_sum_(logits: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    """Sum of the negative log-likelihood of the labelled rows, times ``scale``. Overwrites the logits where they need a gradient.

    Args:
        logits: [n, vocabulary], any float dtype; afterwards their gradient lies there.
        targets: [n] int64; -100 where there is no loss.
        scale: factor of the loss; what backward multiplies beside it costs half-precision gradients one more rounding.

    Returns:
        Scalar, in nats, fp32 (fp64 for fp64 logits); 0 with gradient when nothing is labelled.
    """
    return _NllSum.apply(logits, targets, scale, torch.is_grad_enabled() and logits.requires_grad)
