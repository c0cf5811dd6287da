"""A model as a teacher: its own answers to prompts, and how sure it is of each token of them. No label is read."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
from torch import nn
from transformers import PreTrainedTokenizerBase

from trace_dist.data.batches import collate
from trace_dist.data.encoding import IGNORE, Pair, stop_ids
from trace_dist.evaluation.decode import greedy_decode
from trace_dist.evaluation.inputs import config_of, device_of
from trace_dist.evaluation.likelihood import MAX_LOGITS
from trace_dist.evaluation.passes import evaluating, map_over_ranks
from trace_dist.train.loss import answer_logits
from trace_dist.train.soft import SOFT_IDS, SOFT_PROBABILITIES


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[Pair]:
    """A model's greedy answers, each with its end token unless it was cut. Collective.

    Args:
        model: causal LM, possibly sharded.
        tokenizer: its tokenizer.
        prompts: token ids, the same on every rank.
        batch_size: prompts at a time on one rank.
        max_new_tokens: where an answer is cut.

    Raises:
        ValueError: as ``greedy_decode``.
    """
    stop = stop_ids(tokenizer)[0]
    found = greedy_decode(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)
    return [
        Pair(prompt, ids if len(ids) == max_new_tokens else [*ids, stop])
        for prompt, ids in zip(prompts, found, strict=True)
    ]


def teach(
    model: nn.Module, pairs: Sequence[Pair], *, top: int, batch_size: int, pad_id: int
) -> datasets.Dataset:
    """What a model says of each answer token. Collective.

    Args:
        model: causal LM, possibly sharded.
        pairs: prompts and answers, the same on every rank; a prompt has at least one token, and so has an answer.
        top: how many tokens are kept with their probabilities; at most the vocabulary.
        batch_size: examples at a time on one rank; fewer where their logits would exceed 1 GiB.
        pad_id: id for padded positions.

    Returns:
        Columns as of ``encode``, and ``SOFT_IDS``, ``SOFT_PROBABILITIES`` (one list of ``top`` a token), on every rank.
    """
    rows = [{"input_ids": prompt + said, "labels": [IGNORE] * len(prompt) + said} for prompt, said in pairs]
    device = device_of(model)

    def run(indices: list[int]) -> list[tuple[list[list[int]], list[list[float]]]]:
        batch = {key: value.to(device) for key, value in collate([rows[i] for i in indices], pad_id).items()}
        labels = batch.pop("labels")
        logits, targets = answer_logits(model, batch, labels)
        logits = logits[targets != IGNORE].float()
        found = logits.softmax(1).topk(min(top, logits.shape[1]))
        sizes = [len(pairs[i].answer) for i in indices]
        parts = (found.indices.split(sizes), found.values.split(sizes))
        return [(ids.tolist(), values.tolist()) for ids, values in zip(*parts, strict=True)]

    lengths = [len(row["input_ids"]) for row in rows]
    limit = max(1, MAX_LOGITS // (max(lengths) * config_of(model).get_text_config().vocab_size))
    with evaluating(model) as alone:
        said = map_over_ranks(lengths, min(batch_size, limit), run, alone)
    return datasets.Dataset.from_list(
        [
            {**row, "num_answer_tokens": len(ids), SOFT_IDS: ids, SOFT_PROBABILITIES: values}
            for row, (ids, values) in zip(rows, said, strict=True)
        ]
    )
