"""Some answers at a time by transformers' own ``generate``, each with its own limit and stop texts.

``TextIteratorStreamer`` and ``stop_strings`` know one prompt, or one set of stop texts for all. So every token goes to its row
(serving/row.py) through a stopping criterion, which ends each row by itself. On several ranks all of them write the same answers,
or each writes some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from trace_dist.data.encoding import context_length
from trace_dist.evaluation.inputs import config_of, device_of, may_pad_left, pad
from trace_dist.evaluation.passes import evaluating, map_over_ranks
from trace_dist.serving.options import Sampling
from trace_dist.serving.row import Finish, Row
from trace_dist.utils import dist
from trace_dist.utils.rng import random_numbers_kept


class _Dealt(StoppingCriteria):
    """Deals each step's tokens out to the rows; says which of them have ended."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.add(token)
        return input_ids.new_tensor([row.finish is not None for row in self.rows], dtype=torch.bool)


class _DealtByMain(_Dealt):
    """Every rank writes the same rows, and the tokens of rank 0 count.

    Draws differ from rank to rank, and somebody may have hung up on one of them.
    """

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        tokens = input_ids[:, -1]
        if dist.is_main():
            super().__call__(input_ids, scores)
        # Of each row: whether it has ended, whether it was cancelled, and its tokens.
        states = [(finish is not None, finish == "cancelled", num) for finish, num in map(_state, self.rows)]
        told = dist.from_main(torch.cat([tokens[None], tokens.new_tensor(states).T]).contiguous())
        if not dist.is_main():
            tokens.copy_(told[0])  # in the text that is read on
            for row, (token, _, cancelled, num) in zip(self.rows, told.T.tolist(), strict=True):
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
    """Write answers that somebody may read, or draw, as they are written: every rank writes all of them. Collective.

    Prompts are padded on the left and written together, but for models that padding on the left changes
    ([Note: padding and caches] in evaluation/decode.py): there one after the other.

    Args:
        model: as its weights are.
        rows: the answers.
        sampling: what they have in common; limits and stop texts are the rows' own.
        ends: token ids that end an answer.
        fill: token id for padding.
    """
    batches = _fitting(model, rows) if may_pad_left(model) else [[row] for row in rows]
    # What one rank draws by itself ends nothing.
    options = _options(sampling, ends if dist.world_size() == 1 else None, fill)
    with evaluating(model), _seeded(sampling):
        for batch in batches:
            _generate(model, _DealtByMain(batch), options)


def write_out(
    model: PreTrainedModel, rows: Sequence[Row], batch_size: int, ends: list[int], fill: int
) -> None:
    """Write greedy answers that are read at their end alone: every rank writes some of them. Collective.

    Args:
        model: as its weights are.
        rows: the answers, which nobody listens to or cancels; on every rank they hold all answers afterwards. Which of them are
            written together depends on the number of ranks, and so does rounding.
        batch_size: answers that one rank writes at a time, at most.
        ends, fill: as ``write``.
    """
    options, most = _options(Sampling(), ends, fill), batch_size if may_pad_left(model) else 1
    with evaluating(model) as alone:
        for part in _fitting(model, rows):

            def tokens_of(batch: list[int], part: Sequence[Row] = part) -> list[list[int]]:
                # Of copies: a rank that has nothing left to write repeats a row that another one writes.
                fresh = [part[number].unwritten() for number in batch]
                # Where forward passes are collective, a rank goes on until all have written theirs.
                found = _generate(model, _Dealt(fresh), options, synced_gpus=not alone)
                return [ids[: len(row.tokens) + 1] for ids, row in zip(found.tolist(), fresh, strict=True)]

            size = min(most, -(-len(part) // dist.world_size()))  # few answers too are shared out
            written = map_over_ranks([len(row.prompt) for row in part], size, tokens_of, alone)
            for row, tokens in zip(part, written, strict=True):
                for token in tokens:
                    row.add(token)


def _fitting(model: PreTrainedModel, rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that can be written together: one that has ended is read on until the last one ends, within the model's positions."""
    context, parts, most = context_length(config_of(model)), list[list[Row]](), 0
    for row in sorted(rows, key=lambda row: len(row.prompt)):
        most = max(most, row.limit)
        # The last token is not read again.
        if not parts or (context is not None and len(row.prompt) + most - 1 > context):
            parts.append([])
            most = row.limit
        parts[-1].append(row)
    return parts


def _generate(
    model: PreTrainedModel, dealt: _Dealt, options: Mapping[str, Any], synced_gpus: bool | None = None
) -> Tensor:
    """Token ids of the answers, int64 [rows, tokens]; what stands behind an answer's end is none of it."""
    fill = options["pad_token_id"]
    ids, mask = pad([row.prompt for row in dealt.rows], fill, device_of(model), left=True)
    most = max(row.limit for row in dealt.rows)
    generate: Any = model.generate
    found: Tensor = generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=GenerationConfig(max_new_tokens=most, **options),
        stopping_criteria=StoppingCriteriaList([dealt]),
        synced_gpus=synced_gpus,
    )
    return found[:, ids.shape[1] :]


def _options(sampling: Sampling, ends: list[int] | None, fill: int) -> dict[str, Any]:
    """transformers' options of how tokens are chosen."""
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    common = {"do_sample": sampling.draws, "eos_token_id": ends, "pad_token_id": fill}
    return {**common, **(drawn if sampling.draws else {})}


@contextmanager
def _seeded(sampling: Sampling) -> Iterator[None]:
    if sampling.seed is None or not sampling.draws:
        yield
        return
    with random_numbers_kept():
        torch.manual_seed(sampling.seed)
        yield
