"""Training on a teacher's probabilities: batches that carry them, their cross-entropy, and a learner that reads both.

Of each answer token a teacher gives its k likeliest tokens with their probabilities; what is left is one more outcome, "any other
token". The cross-entropy of these k + 1 outcomes is the distillation loss (Hinton et al., arXiv 1503.02531) at temperature 1, up
to what a teacher says of tokens that it finds unlikely, and with k = vocabulary exactly. As in ``cross_entropy.py`` its gradient
takes the place of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trace_dist.data.batches import Batches, Step
from trace_dist.data.encoding import IGNORE
from trace_dist.train.cross_entropy import GradientInPlace, chunks, rows_at_a_time
from trace_dist.train.learner import MaskedLearner
from trace_dist.train.loss import Forward, accumulate, answer_logits

SOFT_IDS, SOFT_PROBABILITIES = "soft_ids", "soft_probabilities"
"""Columns of a taught dataset: for each answer token its k likeliest tokens and their probabilities; and so in a micro-batch,
[answer tokens, k] int64 and fp32, row by row."""
LEAST = 1e-30
"""Below it a probability is taken for this much: its logarithm stays finite."""


class SoftBatches(Batches):
    """Batches of a taught dataset (``train.teacher``)."""

    are_given = False

    def _tensors(self, rows: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
        batch = super()._tensors(rows)
        examples = [example for row in rows for example in row]
        ids = [token for example in examples for token in example[SOFT_IDS]]
        probabilities = [token for example in examples for token in example[SOFT_PROBABILITIES]]
        batch[SOFT_IDS] = torch.tensor(ids, dtype=torch.int64).view(len(ids), -1 if ids else 1)
        batch[SOFT_PROBABILITIES] = torch.tensor(probabilities, dtype=torch.float32).view(
            batch[SOFT_IDS].shape
        )
        return batch

    def _slice(self, whole: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        part = super()._slice(whole, index)
        length = part["input_ids"].shape[1]
        _, columns = (whole["labels"][:, 1:] != IGNORE).nonzero(as_tuple=True)
        mine = columns // length == index
        return part | {name: whole[name][mine] for name in (SOFT_IDS, SOFT_PROBABILITIES)}


class SoftLearner(MaskedLearner):
    """Masked training on what a teacher says."""

    def accumulate(self, step: Step) -> Tensor:
        return accumulate(step, self.forward, self.backward, self.device, forward_soft_nll_sum)


def forward_soft_nll_sum(
    forward: Forward, inputs: dict[str, Tensor], labels: Tensor, scale: float = 1.0
) -> Tensor:
    """As ``forward_nll_sum``, of a micro-batch of ``SoftBatches``."""
    ids, probabilities = inputs.pop(SOFT_IDS), inputs.pop(SOFT_PROBABILITIES)
    logits, targets = answer_logits(forward, inputs, labels)
    return soft_nll_sum_(logits, targets, ids, probabilities, scale)


def soft_nll_sum_(
    logits: Tensor, targets: Tensor, ids: Tensor, probabilities: Tensor, scale: float = 1.0
) -> Tensor:
    """Cross-entropy with a teacher, summed over the labelled rows, times ``scale``. Overwrites logits that need a gradient.

    Args:
        logits: [n, vocabulary], any float dtype; afterwards their gradient lies there.
        targets: [n] int64; -100 where there is no loss. What else they say is not read.
        ids: [m, k] int64, for each row with a loss: distinct tokens.
        probabilities: [m, k] of these, adding up to at most 1; the rest is that of any other token.
        scale: factor of the loss.

    Returns:
        Scalar, in nats, fp32 (fp64 for fp64 logits); 0 with gradient when nothing is labelled.
    """
    overwrite = torch.is_grad_enabled() and logits.requires_grad
    return _SoftNllSum.apply(logits, targets, ids, probabilities, scale, overwrite)


class _SoftNllSum(GradientInPlace):
    """With q = softmax(z), K the teacher's tokens, p their probabilities, r = 1 - sum p and R = 1 - sum of q over K:

    loss = - sum p log q - r log R;  its gradient is q - p on K, and q (1 - r / R) elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        ids: Tensor,
        probabilities: Tensor,
        scale: float,
        overwrite: bool,
    ) -> Tensor:
        logits = logits.detach()
        wide = torch.promote_types(logits.dtype, torch.float32)
        # Those with a loss, in order; how many is known, and asking a GPU would have the host wait.
        rows = (targets == IGNORE).to(torch.uint8).argsort(stable=True)[: len(ids)]
        total = logits.new_zeros((), dtype=wide)
        for chunk in chunks(len(rows), rows_at_a_time(logits)):
            some, known = rows[chunk], ids[chunk]
            p = probabilities[chunk].to(wide)
            q = logits[some].to(wide).softmax(1)
            ours = q.gather(1, known)
            q.scatter_(1, known, 0)
            # not 1 minus the others, which would cancel where the model is sure
            rest = q.sum(1, keepdim=True).clamp_(min=LEAST)
            left = (1 - p.sum(1, keepdim=True)).clamp_(min=0)
            total -= (p * ours.clamp(min=LEAST).log()).sum() + (left * rest.log()).sum()
            if overwrite:
                q.mul_(1 - left / rest).scatter_(1, known, ours - p)
                logits[some] = q.mul_(scale).to(logits.dtype)
        if overwrite:
            logits[targets == IGNORE] = 0
        ctx.save_for_backward(logits)
        return scale * total
