"""Whether a model keeps examples that share a row apart: measured on a row of the first batches, before it is trained on any.

[Note: apart] Three forward passes. The logits of a packed row must be those of its examples by themselves, up to rounding; and
where the first example of the row is replaced by other tokens, the logits of the others must stay. The answers are compared, and
the first tokens of each example, where a short convolution would show. A model that carries a state along the row (Mamba, RWKV,
hybrids), or that places tokens in another way, fails one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trace_dist.data.batches import Batches, collate
from trace_dist.data.encoding import IGNORE
from trace_dist.data.packing import Layout, collate_packed
from trace_dist.evaluation.inputs import config_of, supported
from trace_dist.evaluation.passes import evaluating
from trace_dist.train.learner import Learner
from trace_dist.train.loss import answer_logits
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

HALF_ROUNDING, ROUNDING = 0.02, 1e-3
"""Share of the range of logits by which rounding may move them: in half precision, and otherwise."""
LEAK = 0.25
"""Share of that by which the other examples of the row may: the shapes are the same, and what is masked out adds exact zeros."""
REROUTED = 0.5
"""Share of the tokens that may differ more in half precision, where other shapes are rounded otherwise: a token may go to another
expert, as it may with other padding. Wrong positions move every token behind the first example."""
BEGINNING = 4
"""First tokens of each example that are compared beside the answers."""
NUM_BATCHES = 20
"""Batches that are looked at beforehand: for a row to measure on, and for the padding that the log tells."""


def settle_packing(learner: Learner, batches: Batches) -> None:
    """Let the examples of batches share rows where that was asked for and the model keeps them apart. Collective."""
    if not batches.wants_packing:
        return
    layout = layout_of(learner)
    row = batches.fullest_row(NUM_BATCHES)
    if len(row) < 2:
        logger.info(
            "data.packing: no two examples of a batch fit into a row, which is as long as the longest; nothing is packed"
        )
        batches.pack(None)
        return
    reason = mixes(learner, row, layout)
    batches.pack(None if reason else layout)
    if reason:
        name = type(learner.module).__name__
        logger.warning("data.packing: is off, %s %s; examples are padded instead", name, reason)
    else:
        before, after = batches.padding(NUM_BATCHES)
        logger.info(
            "data.packing: %.1f %% of the positions are padding, without it %.1f %%",
            100 * after,
            100 * before,
        )


def layout_of(learner: Learner) -> Layout:
    """How the model's attention takes packed rows."""
    attention = str(getattr(config_of(learner.module), "_attn_implementation", ""))
    return "flat" if "flash" in attention else "rows"


def mixes(learner: Learner, examples: list[dict[str, Any]], layout: Layout) -> str | None:
    """Why a model must not be given packed rows; None where it may ([Note: apart]). Collective.

    Args:
        learner: with the model.
        examples: encoded examples, at least two, that make a row.
        layout: of packed rows.
    """
    if not supported(learner.module, position_ids=None):
        return "takes no position_ids"
    examples = [_looked_at(example) for example in examples]
    vocabulary = config_of(learner.module).get_text_config().vocab_size
    other = {**examples[0], "input_ids": [(token + 1) % vocabulary for token in examples[0]["input_ids"]]}
    batches = (
        collate(examples, 0),
        collate_packed([examples], 0, layout),
        collate_packed([[other, *examples[1:]]], 0, layout),
    )
    try:
        with evaluating(learner.module):
            alone, packed, disturbed = (labelled_logits(learner, batch) for batch in batches)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        return f"fails on packed rows ({type(error).__name__}: {str(error).partition(chr(10))[0]:.120})"
    half = is_half(learner.module, alone)
    most = most_rounding(alone, half)
    first = sum(label != IGNORE for label in examples[0]["labels"])
    leaks = moved(packed[first:], disturbed[first:], LEAK * most)
    differs = max(moved(alone[:first], packed[:first], most), moved(alone[first:], packed[first:], most))
    for share, allowed, what in (
        (leaks, 0.0, "lets the examples of a row see each other"),
        (differs, REROUTED if half else 0.0, "gives other answers in a packed row"),
    ):
        share = dist.max_over_ranks(share)
        if share > allowed:
            return f"{what} (the logits of {share:.0%} of the tokens move)"
    return None


def is_half(module: nn.Module, logits: Tensor) -> bool:
    """Whether weights or logits are in half precision."""
    weights = next(module.parameters())
    return torch.finfo(torch.float16).bits in (torch.finfo(each.dtype).bits for each in (logits, weights))


def most_rounding(logits: Tensor, half: bool) -> float:
    """By how much rounding may move logits."""
    return (HALF_ROUNDING if half else ROUNDING) * float(logits.float().max() - logits.float().min())


def _looked_at(example: dict[str, Any]) -> dict[str, Any]:
    """An example whose labels say which logits are compared: those before its answers, and those of its first tokens."""
    ids, labels = example["input_ids"], list(example["labels"])
    labels[1 : BEGINNING + 1] = ids[1 : BEGINNING + 1]
    return {"input_ids": ids, "labels": labels}


def labelled_logits(learner: Learner, batch: dict[str, Tensor]) -> Tensor:
    """Logits before each labelled token, row by row: [labelled tokens, vocabulary]."""
    inputs = {key: value.to(learner.device) for key, value in batch.items()}
    logits, targets = answer_logits(learner.forward, inputs, inputs.pop("labels"))
    return logits[targets != IGNORE]


def moved(one: Tensor, other: Tensor, most: float) -> float:
    """Share of the tokens of which a logit differs by more than ``most``."""
    still = (one.float() - other.float()).abs().amax(1) <= most
    return float((~still).float().mean()) if len(one) else 0.0
