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
from trace_dist.serving.row import Finish, Row
from trace_dist.utils import dist
from trace_dist.utils.rng import random_numbers_kept


class _Dealt(StoppingCriteria):
    """Deals each step's tokens out to the rows; says which of them have ended.

    On several ranks those of rank 0 count: draws differ from rank to rank, and somebody may have hung up on one of them.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        tokens = input_ids[:, -1]
        if dist.is_main():
            for row, token in zip(self._rows, tokens.tolist(), strict=True):
                row.add(token)
        # Of each row: whether it has ended, whether it was cancelled, and its tokens.
        states = [(finish is not None, finish == "cancelled", num) for finish, num in map(_state, self._rows)]
        told = dist.from_main(torch.cat([tokens[None], tokens.new_tensor(states).T]).contiguous())
        if not dist.is_main():
            tokens.copy_(told[0])  # in the text that is read on
            for row, (token, _, cancelled, num) in zip(self._rows, told.T.tolist(), strict=True):
                if not cancelled or num > len(row.tokens):
                    row.add(token)
                if cancelled:
                    row.cancel()
        return told[1] != 0


def _state(row: Row) -> tuple[Finish | None, int]:
    return row.finish, len(row.tokens)


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
    options: dict[str, Any] = {}
    if sampling.temperature > 0:
        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=max(row.limit for row in rows),
        do_sample=bool(options),
        # On several ranks `_Dealt` alone ends rows: what one rank draws by itself ends nothing.
        eos_token_id=ends if dist.world_size() == 1 else None,
        pad_token_id=fill,
        **options,
    )


@contextmanager
def _seeded(sampling: Sampling) -> Iterator[None]:
    if sampling.seed is None or sampling.temperature == 0:
        yield
        return
    with random_numbers_kept():
        torch.manual_seed(sampling.seed)
        yield
