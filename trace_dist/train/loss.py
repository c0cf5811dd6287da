"""Next-token loss, summed over answer tokens so that a global mean is exact for uneven token counts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_dist.data.batches import Step
from trace_dist.utils import dist

Forward = Callable[..., Any]
Backward = Callable[[Tensor], None]


def answer_nll_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the negative log-likelihood of the labelled tokens.

    Args:
        logits: [batch, length, vocabulary], any float dtype (upcast to fp32).
        labels: [batch, length] int64; -100 where there is no loss.

    Returns:
        Scalar fp32, in nats; 0 with gradient when nothing is labelled.
    """
    shifted = labels[:, 1:].reshape(-1)
    kept = shifted != -100
    picked = logits[:, :-1].reshape(-1, logits.shape[-1])[kept].float()
    return F.cross_entropy(picked, shifted[kept], reduction="sum")


def accumulate(step: Step, forward: Forward, backward: Backward, device: torch.device) -> Tensor:
    """Forward and backward over a step's micro-batches on this rank.

    Args:
        step: this rank's part of a global batch.
        forward: the model; called with the micro-batch's inputs, returns an output with ``logits``.
        backward: takes each micro-batch's loss; what it adds up over ranks is the gradient of the global mean loss.
        device: where the model computes.

    Returns:
        This rank's part of the mean loss per answer token of the global batch: scalar fp64, detached.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in step.micro_batches:
        inputs = {key: value.to(device) for key, value in micro_batch.items()}
        labels = inputs.pop("labels")
        loss = answer_nll_sum(forward(**inputs).logits, labels) / max(step.num_answer_tokens, 1)
        backward(loss)
        total += loss.detach().double()
    return total


def autocast(dtype: str) -> AbstractContextManager[Any]:
    """Mixed precision for fp32 weights: matmuls in bfloat16 where ``dtype`` says so; nothing changes for float32."""
    return torch.autocast(dist.local_device().type, torch.bfloat16, enabled=dtype == "bfloat16")
