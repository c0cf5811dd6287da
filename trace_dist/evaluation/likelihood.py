"""Log-likelihood of given tokens after a context; the common part of choices and bits per byte."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from trace_dist.data.encoding import IGNORE, Pair, check_context
from trace_dist.evaluation.inputs import (
    check_decoder,
    config_of,
    device_of,
    last,
    may_pad_left,
    pad,
    positions,
    safe_batch_size,
    supported,
)
from trace_dist.evaluation.passes import evaluating, map_over_ranks

MAX_LOGITS = 2**28
"""Largest number of fp32 logits held at once (1 GiB); batches of long texts are cut to it."""


def log_likelihoods(
    model: torch.nn.Module, pairs: Sequence[Pair], *, batch_size: int, pad_id: int
) -> list[float]:
    """Natural log-probability of each pair's answer tokens given its prompt tokens, summed in fp32.

    Args:
        model: causal LM, possibly sharded; every rank must call this with the same pairs.
        pairs: token ids; a prompt has at least one.
        batch_size: pairs per forward pass on one rank; fewer where their logits would exceed 1 GiB.
        pad_id: id for padded positions.

    Returns:
        One value per pair, in their order, on every rank; 0 for an empty answer.

    Raises:
        ValueError: no pairs, or a pair does not fit the model's context.
    """
    if not pairs:
        raise ValueError("log_likelihoods: there is nothing to score; give at least one example")
    lengths = [len(pair.prompt) + len(pair.answer) for pair in pairs]
    check_decoder(model)
    check_context(max(lengths) - 1, config_of(model))  # the last token is only predicted, never read
    left = may_pad_left(model)
    # Padded on the left, all answers end in the last column; on the right, their columns may lie anywhere.
    scored = max(len(pair.answer) for pair in pairs) if left else max(lengths)
    limit = max(1, MAX_LOGITS // (max(1, scored) * config_of(model).get_text_config().vocab_size))

    def run(indices: list[int]) -> list[float]:
        return _score_batch(model, [pairs[i] for i in indices], pad_id, left)

    with evaluating(model) as alone:
        rows = [pair.prompt + pair.answer for pair in pairs]
        size = safe_batch_size(model, rows, pad_id, min(batch_size, limit))
        return map_over_ranks(lengths, size, run, alone)


def _score_batch(model: torch.nn.Module, pairs: list[Pair], pad_id: int, left: bool) -> list[float]:
    device = device_of(model)
    rows = [[*prompt, *answer][:-1] if answer else prompt for prompt, answer in pairs]
    tokens, mask = pad(rows, pad_id, device, left=left)
    # What follows each token: only answers are scored.
    wanted = [
        [IGNORE] * (len(row) - len(pair.answer)) + pair.answer for row, pair in zip(rows, pairs, strict=True)
    ]
    targets, _ = pad(wanted, IGNORE, device, left=left)
    columns = (targets != IGNORE).any(dim=0).tolist()
    num_scored = len(columns) - columns.index(True) if any(columns) else 1
    targets = targets[:, -num_scored:]
    options = {"attention_mask": mask, "use_cache": False, "logits_to_keep": last(tokens, num_scored)}
    if left:
        options["position_ids"] = positions(mask)
    logits = model(input_ids=tokens, **supported(model, **options)).logits[:, -num_scored:]
    nll = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return [-value for value in nll.view_as(targets).sum(dim=1).tolist()]
