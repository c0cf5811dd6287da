"""Next-token loss on answer tokens, summed so that a global mean is exact for uneven token counts.

Only positions that are followed by an answer token need logits. Where a model takes ``logits_to_keep`` (nearly all
of transformers' do), no others are computed: with a large vocabulary they would outweigh every other activation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_dist.data.batches import Step
from trace_dist.data.encoding import IGNORE
from trace_dist.evaluation.inputs import supported
from trace_dist.models.forward import names_argument
from trace_dist.train.cross_entropy import nll_sum_
from trace_dist.utils import dist
from trace_dist.utils.devices import sent

Forward = Callable[..., Any]
Backward = Callable[[Tensor], None]
NllSum = Callable[[Forward, dict[str, Tensor], Tensor, float], Tensor]


def answer_nll_sum_(logits: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    """Sum of the negative log-likelihood of the labelled tokens. Overwrites the logits (``nll_sum_``).

    Args:
        logits: [batch, length, vocabulary], any float dtype.
        labels: [batch, length] int64, or one more (``answer_logits``); -100 where there is no loss.
        scale: factor of the loss.

    Returns:
        Scalar, in nats, fp32 (fp64 for fp64 logits); 0 with gradient when nothing is labelled.
    """
    return nll_sum_(logits.flatten(0, 1), _following(labels, logits.shape[1]), scale)


def forward_nll_sum(
    forward: Forward, inputs: dict[str, Tensor], labels: Tensor, scale: float = 1.0
) -> Tensor:
    """Run the model on inputs [batch, length]; the rest is as in ``answer_nll_sum_``.

    Args:
        forward: the model, a sharded model, or a function of either that passes its arguments on.
        inputs: ``input_ids`` and ``attention_mask``, or ``position_ids`` of packed rows (data/packing.py).
        labels: as above.
        scale: as above.
    """
    logits, targets = answer_logits(forward, inputs, labels)
    return nll_sum_(logits, targets, scale)


def answer_logits(forward: Forward, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model where an answer token follows in some row of the batch.

    Args:
        forward: as in ``forward_nll_sum``.
        inputs: as there, [batch, length].
        labels: [batch, length] int64; -100 where there is no loss. One more of a slice of rows, whose last token is followed by
            one of another slice (data/slices.py). They are read here: on a GPU the host would wait for them, so they had better
            be on the CPU.

    Returns:
        Logits [n, vocabulary], and what follows, [n] int64: -100 where that is no answer token. Row by row of the batch.
    """
    # No token follows these: keys, values and states kept for one would be copies of what backward keeps anyway.
    options = {"use_cache": False} if _takes(forward, "use_cache") else {}
    if "position_ids" in inputs:  # with a cache, transformers would not see that examples share a row
        options = supported(_module(forward), use_cache=False)
    if not _takes(forward, "logits_to_keep"):
        logits = forward(**inputs, **options).logits
        return logits.flatten(0, 1), sent(_following(labels, logits.shape[1]), logits.device)
    targets = labels[:, 1:]
    positions = (targets != IGNORE).any(0).nonzero().flatten()
    if len(positions) == 0:  # a filler batch: its backward pass must still run
        positions = positions.new_zeros(1)
    kept = sent(positions, next(iter(inputs.values())).device)
    logits = forward(**inputs, **options, logits_to_keep=kept).logits
    return logits.flatten(0, 1), sent(targets[:, positions].flatten(), logits.device)


def _following(labels: Tensor, length: int) -> Tensor:
    """What follows each position, [batch * length]; nothing the last ones: to cut their logits off would copy the others.

    Args:
        labels: [batch, length], or what follows the last ones, too: [batch, length + 1].
        length: of the input.
    """
    return F.pad(labels[:, 1:], (0, length + 1 - labels.shape[1]), value=IGNORE).flatten()


def _takes(forward: Forward, argument: str) -> bool:
    """Whether the model behind a forward function names an argument."""
    module = _module(forward)
    return isinstance(module, nn.Module) and names_argument(module, argument)


def _module(forward: Forward) -> Any:
    """The model behind a forward function, as far as that can be known."""
    owner = getattr(forward, "__self__", forward)
    return getattr(owner, "module", owner)


def accumulate(
    step: Step,
    forward: Forward,
    backward: Backward,
    device: torch.device,
    nll_sum: NllSum | None = None,
) -> Tensor:
    """Forward and backward over a step's micro-batches on this rank.

    Args:
        step: this rank's part of a global batch.
        forward: the model, a sharded model, or a learner's ``forward``.
        backward: takes each micro-batch's loss; what it adds up over ranks is the gradient of the global mean loss.
        device: where the model computes.
        nll_sum: the loss of a micro-batch, as ``forward_nll_sum``; ``inputs`` holds whatever the batches do beside labels. The
            step's own when None, which is ``forward_nll_sum`` where it names none.

    Returns:
        This rank's part of the mean loss per answer token of the global batch: scalar fp64, detached.
    """
    nll_sum = nll_sum or step.nll_sum or forward_nll_sum
    total = torch.zeros((), dtype=torch.float64, device=device)
    for micro_batch in step.micro_batches:
        labels = micro_batch["labels"]  # read on the host, which waits for nothing
        inputs = {key: sent(value, device) for key, value in micro_batch.items() if key != "labels"}
        loss = nll_sum(forward, inputs, labels, 1 / max(step.num_answer_tokens, 1))
        backward(loss)
        total += loss.detach().double()
    return total


def autocast(dtype: str) -> AbstractContextManager[Any]:
    """Mixed precision for fp32 weights: matmuls in bfloat16 where ``dtype`` says so; nothing changes for float32."""
    return torch.autocast(dist.local_device().type, torch.bfloat16, enabled=dtype == "bfloat16")
