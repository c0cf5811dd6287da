"""Greedy exact match: decode an answer for each prompt and compare it with the reference as text.

The loop is ours rather than ``model.generate`` because all ranks of a sharded model must take the same
number of decoding steps; it equals unbatched ``generate(do_sample=False)`` prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trace_dist.data.encoding import check_context, encode_pairs, encode_prompt, pad_id, stop_ids
from trace_dist.evaluation.inputs import config_of, device_of, last, left_pad, positions, supported
from trace_dist.evaluation.score import Score, accuracy, evaluating, map_over_ranks
from trace_dist.evaluation.wording import Wording
from trace_dist.utils import dist


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
        pairs = encode_pairs(prompt_texts, references, tokenizer)
        max_new_tokens = max(len(pair.answer) for pair in pairs) + 1
    prompts = encode_prompt(prompt_texts, tokenizer, max_prompt_tokens)
    outputs = greedy_decode(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens)
    wording = Wording.of(tokenizer)
    return accuracy(
        [
            wording.said(ids) == wording.taught(reference)
            for ids, reference in zip(outputs, references, strict=True)
        ]
    )


def greedy_decode(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[list[int]]:
    """Continue each prompt by the most likely token until a stop token (not returned) or the cap.

    Every rank gets all outputs, in the order of ``prompts``. Raises ValueError where ``exact_match`` does.
    """
    if max_new_tokens < 1:
        raise ValueError(
            f"eval.max_new_tokens={max_new_tokens}: must be at least 1; raise it or leave it out"
        )
    lengths = [len(prompt) for prompt in prompts]
    check_context(max(lengths) + max_new_tokens - 1, config_of(model))  # the last token is not read again
    stops, fill = stop_ids(tokenizer), pad_id(tokenizer)

    def run(indices: list[int]) -> list[list[int]]:
        return _decode_batch(model, [prompts[i] for i in indices], stops, fill, max_new_tokens)

    with evaluating(model):
        return map_over_ranks(lengths, batch_size, run)


def _decode_batch(
    model: torch.nn.Module, prompts: list[list[int]], stops: list[int], fill: int, max_new_tokens: int
) -> list[list[int]]:
    tokens, mask = left_pad(prompts, fill, device_of(model))
    position_ids = positions(mask)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=tokens.device)
    is_stop = torch.tensor(stops, device=tokens.device)
    cache: Any = None
    decoded = []
    for _ in range(max_new_tokens):
        extra = supported(model, position_ids=position_ids, logits_to_keep=last(tokens, 1))
        output = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
        cache = output.past_key_values
        if cache is None:
            raise ValueError(
                f"{type(model).__name__}: returned no key-value cache; use a model that decodes with one"
            )
        tokens = output.logits[:, -1:].argmax(dim=-1)
        done = done | torch.isin(tokens[:, 0], is_stop)
        decoded.append(tokens[:, 0].masked_fill(done, -1))
        # A rank that is done goes on until the slowest is: forward passes of a sharded model are collective.
        if dist.max_over_ranks(float(not done.all())) == 0:
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
    return [[token for token in row if token >= 0] for row in torch.stack(decoded, dim=1).tolist()]
