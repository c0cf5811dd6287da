"""Next-token loss, summed over answer tokens so that a global mean is exact for uneven token counts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
