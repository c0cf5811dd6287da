"""Accuracy over a closed set of answers: the label with the largest log-likelihood wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trace_dist.data.encoding import Pair, encode_pairs, encode_prompt
from trace_dist.data.examples import references_of
from trace_dist.evaluation.inputs import fill_id
from trace_dist.evaluation.likelihood import log_likelihoods
from trace_dist.evaluation.score import Score, mean_score


def choice_accuracy(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    choices: Sequence[str],
    *,
    batch_size: int,
    max_prompt_tokens: int | Sequence[int] | None = None,
) -> Score:
    """Percent of examples whose answer is the choice of largest log-likelihood given the prompt.

    The likelihood is that of the whole answer, *with* its end token and *not* divided by its length: so it
    is a probability, and of two labels of which one begins the other ("1", "10") neither is favoured by
    form. Ties go to the earlier choice.

    Args:
        model: causal LM, possibly sharded; every rank must call this with the same examples.
        tokenizer: with or without a chat template.
        examples: ``{"prompt", "answer"}``; each answer (and each of several ``references``) is one of ``choices``, up to outer
            white space.
        choices: the labels.
        batch_size: (prompt, choice) pairs per forward pass on one rank.
        max_prompt_tokens: cut longer prompts on the left, all to one length or each to its own; None cuts nothing.

    Raises:
        ValueError: no examples, an answer that is no choice, or a pair that does not fit the context.
    """
    rows = list(examples)
    labels = [choice.strip() for choice in choices]
    wanted = [[answer.strip() for answer in references_of(row)] for row in rows]
    for i, answers in enumerate(wanted):
        for answer in set(answers) - set(labels):
            raise ValueError(f"example {i}: answer {answer!r} is not one of {list(choices)}; add it to them")
    prompts = [row["prompt"] for row in rows]
    prompt_ids = encode_prompt(prompts, tokenizer, max_prompt_tokens)
    asked = [prompt for prompt in prompts for _ in choices]
    full = encode_pairs(asked, list(choices) * len(rows), tokenizer)
    pairs = [Pair(prompt_ids[i // len(choices)], pair.answer) for i, pair in enumerate(full)]
    scores = log_likelihoods(model, pairs, batch_size=batch_size, pad_id=fill_id(model, tokenizer))
    by_example = torch.tensor(scores, dtype=torch.float64).view(len(rows), len(choices))
    taken = [labels[best] for best in by_example.argmax(dim=1).tolist()]
    return mean_score([float(label in answers) for label, answers in zip(taken, wanted, strict=True)], taken)
