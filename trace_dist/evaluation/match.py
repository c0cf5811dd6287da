"""Greedy exact match: decode an answer for each prompt and compare it with the reference as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from trace_dist.data.encoding import encode_prompt
from trace_dist.evaluation.decode import greedy_decode
from trace_dist.evaluation.lengths import longest_answer
from trace_dist.evaluation.score import Score, accuracy
from trace_dist.evaluation.wording import Wording


def exact_match(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, str]],
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    max_prompt_tokens: int | None = None,
) -> Score:
    """Percent of prompts whose greedily decoded text equals the reference, without outer white space.

    A thinking block at the beginning of either, which a model with a chat template may write, is not compared.

    Args:
        model: causal LM, possibly sharded; every rank must call this with the same examples.
        tokenizer: with or without a chat template.
        examples: ``{"prompt", "answer"}``.
        batch_size: prompts decoded together on one rank.
        max_new_tokens: cap on decoded tokens; the longest reference with its end token, plus 1, when None.
        max_prompt_tokens: cut longer prompts on the left, as training did; None cuts nothing.

    Raises:
        ValueError: no examples, or prompt and cap do not fit the model's context.
    """
    rows = list(examples)
    if not rows:
        raise ValueError("exact_match: there are no examples; give at least one")
    prompt_texts, references = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    if max_new_tokens is None:
        max_new_tokens = longest_answer(tokenizer, rows) + 1
    prompts = encode_prompt(prompt_texts, tokenizer, max_prompt_tokens)
    outputs = greedy_decode(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)
    wording = Wording.of(tokenizer)
    return accuracy(
        [
            wording.said(ids) == wording.taught(reference)
            for ids, reference in zip(outputs, references, strict=True)
        ]
    )
