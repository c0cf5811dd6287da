"""Scores of generated answers: decode an answer for each prompt and compare it with the references as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trace_dist.data.encoding import encode_prompt
from trace_dist.data.examples import question_of, references_of
from trace_dist.evaluation.decode import greedy_decode
from trace_dist.evaluation.lengths import longest_answer
from trace_dist.evaluation.metric import Compare
from trace_dist.evaluation.score import Score, mean_score
from trace_dist.evaluation.wording import Wording


def score_generated(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    compare: Compare,
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    max_prompt_tokens: int | Sequence[int] | None = None,
) -> Score:
    """Mean score of the greedily decoded texts, in percent.

    Outer white space and a thinking block at the beginning, which a model with a chat template may write, are compared in neither
    the texts nor the references.

    Args:
        model: causal LM, possibly sharded; every rank must call this with the same examples.
        tokenizer: with or without a chat template.
        examples: ``{"prompt", "answer"}``, with ``references`` where there are several.
        compare: score of a text.
        batch_size: prompts decoded together on one rank.
        max_new_tokens: cap on decoded tokens; the longest reference with its end token, plus 1, when None.
        max_prompt_tokens: cut longer prompts on the left, all to one length or each to its own; None cuts nothing.

    Raises:
        ValueError: no examples, prompt and cap do not fit the model's context, or ``compare`` fails.
    """
    rows = list(examples)
    if not rows:
        raise ValueError("examples: there are no examples to score; give at least one")
    if max_new_tokens is None:
        max_new_tokens = longest_answer(tokenizer, rows) + 1
    prompts = encode_prompt([row["prompt"] for row in rows], tokenizer, max_prompt_tokens)
    return score_encoded(
        model, tokenizer, rows, prompts, compare, batch_size=batch_size, max_new_tokens=max_new_tokens
    )


def score_encoded(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[list[int]],
    compare: Compare,
    *,
    batch_size: int,
    max_new_tokens: int | Sequence[int],
) -> Score:
    """As ``score_generated``, of the token ids of each row's prompt."""
    outputs = greedy_decode(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)
    wording = Wording.of(tokenizer)
    said = [wording.said(ids) for ids in outputs]
    scores = [
        compare(
            answer,
            [wording.taught(reference) for reference in references_of(row)],
            question_of(row["prompt"]),
        )
        for answer, row in zip(said, rows, strict=True)
    ]
    return mean_score(scores, said)


def exact_match(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    max_prompt_tokens: int | Sequence[int] | None = None,
) -> Score:
    """Percent of prompts whose greedily decoded text equals a reference; arguments and errors as of ``score_generated``."""
    return score_generated(
        model,
        tokenizer,
        examples,
        lambda said, references, prompt: float(said in references),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
    )
