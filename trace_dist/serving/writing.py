"""Some answers at a time by transformers' own ``generate``, each with its own limit and stop texts.

``TextIteratorStreamer`` and ``stop_strings`` know one prompt, or one set of stop texts for all. So every token goes to its row
(serving/row.py) through a stopping criterion, which ends each row by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from trace_dist.evaluation.inputs import device_of, may_pad_left, pad
from trace_dist.evaluation.passes import evaluating
from trace_dist.serving.options import Sampling
from trace_dist.serving.row import Row
from trace_dist.utils.rng import random_numbers_kept


class _Dealt(StoppingCriteria):
    """Deals each step's tokens out to the rows; says which of them have ended."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.add(token)
        ended = [row.finish is not None for row in self._rows]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def write(
    model: PreTrainedModel, rows: Sequence[Row], sampling: Sampling, ends: list[int], fill: int
) -> None:
    """Write answers.

    Prompts are padded on the left and written together, but for models that padding on the left changes
    ([Note: padding and caches] in evaluation/decode.py): there one after the other.

    Args:
        model: as its weights are.
        rows: the answers.
        sampling: what they have in common; limits and stop texts are the rows' own.
        ends: token ids that end an answer.
        fill: token id for padding.
    """
    batches = [list(rows)] if may_pad_left(model) else [[row] for row in rows]
    with evaluating(model), _seeded(sampling):
        for batch in batches:
            ids, mask = pad([row.prompt for row in batch], fill, device_of(model), left=True)
            generate: Any = model.generate
            generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=_generation(batch, sampling, ends, fill),
                stopping_criteria=StoppingCriteriaList([_Dealt(batch)]),
            )


def _generation(rows: Sequence[Row], sampling: Sampling, ends: list[int], fill: int) -> GenerationConfig:
    drawn: dict[str, Any] = {}
    if sampling.temperature > 0:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    longest = max(row.limit for row in rows)
    return GenerationConfig(
        max_new_tokens=longest, do_sample=bool(drawn), eos_token_id=ends, pad_token_id=fill, **drawn
    )


@contextmanager
def _seeded(sampling: Sampling) -> Iterator[None]:
    if sampling.seed is None or sampling.temperature == 0:
        yield
        return
    with random_numbers_kept():
        torch.manual_seed(sampling.seed)
        yield
