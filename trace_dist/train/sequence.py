"""Whether a model reads slices of rows as it reads rows: measured on a short one, before it is trained on any.

A model that carries a state along the row (Mamba, RWKV, hybrids), places tokens in another way (ALiBi), or attends past
transformers' interface gives other logits where each rank reads a slice of the row (sharding/sequence.py).
"""

from __future__ import annotations

import torch

from trace_dist.data.batches import Batches, collate
from trace_dist.data.encoding import IGNORE
from trace_dist.data.slices import sliced
from trace_dist.evaluation.inputs import config_of
from trace_dist.evaluation.passes import evaluating
from trace_dist.sharding.sequence import SequenceParallel
from trace_dist.train.learner import Learner
from trace_dist.train.packing import REROUTED, is_half, labelled_logits, most_rounding, moved
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

TOKENS_PER_RANK = 5
"""Of the row that is read; the last slice is not full."""


def settle_sequence(learner: Learner, batches: Batches) -> None:
    """Let ranks share the rows of batches where the learner's model is one of ranks that do. Collective.

    Raises:
        ValueError: the model cannot read slices of rows, or the batches cannot be shared so.
    """
    sequence = None if learner.model is None else learner.model.sequence
    batches.share_rows(1 if sequence is None else sequence.size)
    if sequence is None:
        return
    reason = refuses(learner, sequence)
    if reason:
        raise ValueError(
            f"train.sequence_parallel={sequence.size}: {type(learner.module).__name__} {reason}; use 1"
        )
    logger.info("train.sequence_parallel: %d ranks share each row", sequence.size)


def refuses(learner: Learner, sequence: SequenceParallel) -> str | None:
    """Why a model must not be given slices; None where it may. Collective."""
    vocabulary = config_of(learner.module).get_text_config().vocab_size
    length = TOKENS_PER_RANK * sequence.size - 1
    ids = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = collate([{"input_ids": ids, "labels": [IGNORE, *ids[1:]]}], 0)
    part = sliced(whole, sequence.size, sequence.index)
    first = sequence.index * (part["labels"].shape[1] - 1)
    try:
        with evaluating(learner.module):
            alone, shared = labelled_logits(learner, whole), labelled_logits(learner, part)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        return f"fails on slices of rows ({type(error).__name__}: {str(error).partition(chr(10))[0]:.120})"
    half = is_half(learner.module, alone)
    share = moved(alone[first : first + len(shared)], shared, most_rounding(alone, half))
    share = dist.max_over_ranks(share)
    if share > (REROUTED if half else 0.0):
        return f"gives other answers where ranks share a row (the logits of {share:.0%} of the tokens move)"
    return None
