"""Held-out text loss in bits per UTF-8 byte, which compares models with different tokenizers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trace_dist.data.encoding import Pair, context_length, encode_pairs, encode_prompt, tokenize
from trace_dist.evaluation.inputs import config_of, fill_id
from trace_dist.evaluation.likelihood import log_likelihoods
from trace_dist.evaluation.score import Score


def bits_per_byte(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int,
    max_context: int | None = None,
    stride: int | None = None,
) -> Score:
    """Bits per byte of texts: -log2 p(text) / bytes, over all texts together (each also by itself).

    A text longer than the context is read in overlapping windows. The first scores ``max_context`` tokens,
    each later one moves on by ``stride`` tokens and scores those alone, with all that fits before them as
    context: every token is scored once, after at least ``max_context - stride`` others. The text follows
    bos (``fill_id`` where there is none), so that its first token counts as well.

    Args:
        model: causal LM, possibly sharded; every rank must call this with the same texts.
        tokenizer: its chat template is not used.
        texts: non-empty.
        batch_size: windows per forward pass on one rank.
        max_context: tokens per window; the model's positions, at most 2048, when None.
        stride: tokens scored per later window; half of ``max_context`` when None.

    Raises:
        ValueError: no texts, an empty text, or a window that does not fit the model.
    """
    if max_context is None:
        max_context = min(context_length(config_of(model)) or 2048, 2048)
    stride = max(1, max_context // 2) if stride is None else stride
    if not 1 <= stride <= max_context:
        raise ValueError(f"stride={stride}: must lie in [1, max_context={max_context}]; lower it")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else fill_id(model, tokenizer)
    windows: list[Pair] = []
    owners: list[int] = []
    for i, ids in enumerate(tokenize(list(texts), tokenizer)):
        for window in _windows([start, *ids], max_context, stride):
            windows.append(window)
            owners.append(i)
    nats = log_likelihoods(model, windows, batch_size=batch_size, pad_id=fill_id(model, tokenizer))
    totals = [0.0] * len(texts)
    for owner, value in zip(owners, nats, strict=True):
        totals[owner] -= value
    return _score(totals, texts)


def answer_bits_per_byte(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    max_prompt_tokens: int | Sequence[int] | None = None,
) -> Score:
    """Bits per byte of the (first) answers given their prompts; the end token, which has no bytes, is not counted.

    Args and errors as ``choice_accuracy``; an empty answer is an error.
    """
    rows = list(examples)
    prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    prompt_ids = encode_prompt(prompts, tokenizer, max_prompt_tokens)
    full = encode_pairs(prompts, answers, tokenizer)
    pairs = [Pair(ids, pair.answer[:-1]) for ids, pair in zip(prompt_ids, full, strict=True)]
    nats = log_likelihoods(model, pairs, batch_size=batch_size, pad_id=fill_id(model, tokenizer))
    return _score([-value for value in nats], answers)


def _windows(ids: list[int], max_context: int, stride: int) -> list[Pair]:
    """Pairs (context, scored) that score ids[1:] once; a pair reads at most ``max_context`` tokens."""
    windows = []
    begin, size = 1, max_context
    while begin < len(ids):
        end = min(begin + size, len(ids))
        # The last scored token is predicted but not read: max_context tokens read, ids[first : end - 1].
        first = max(0, end - 1 - max_context)
        windows.append(Pair(ids[first:begin], ids[begin:end]))
        begin, size = end, stride
    return windows


def _score(nats: list[float], texts: Sequence[str]) -> Score:
    num_bytes = [len(text.encode()) for text in texts]
    if 0 in num_bytes:
        raise ValueError(
            f"example {num_bytes.index(0)}: the text is empty, so it has no bits per byte; drop it"
        )
    bits = [value / math.log(2) for value in nats]
    each = [value / size for value, size in zip(bits, num_bytes, strict=True)]
    return Score(sum(bits) / sum(num_bytes), len(texts), each)
