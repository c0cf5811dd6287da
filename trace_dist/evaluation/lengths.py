"""How many tokens scoring reads, worked out before anything is run.

With ``data.truncate_prompt`` each prompt is cut by its own answers, as in training, so that a score does not depend on which
other examples are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data.encoding import encode_pairs, encode_prompt, say_cut
from trace_dist.data.examples import references_of
from trace_dist.data.tasks import Task
from trace_dist.evaluation.metric import load_metric

Rows = Sequence[Mapping[str, Any]]


def longest_answer(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> int:
    """Tokens of the longest reference answer, with its end token."""
    return max(longest_answers(tokenizer, rows))


def longest_answers(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, labels: Sequence[str] | None = None
) -> list[int]:
    """Tokens of each example's longest answer, with its end token, among its references, or among ``labels``."""
    answers = [references_of(row) if labels is None else labels for row in rows]
    prompts = [row["prompt"] for row, several in zip(rows, answers, strict=True) for _ in several]
    pairs = iter(encode_pairs(prompts, [answer for several in answers for answer in several], tokenizer))
    return [max(len(next(pairs).answer) for _ in several) for several in answers]


def prompt_limits(
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    data: DataConfig | None,
    labels: Sequence[str] | None = None,
) -> list[int] | None:
    """Prompt tokens left to each example when its longest answer (and the token after it) must fit as well.

    Args:
        tokenizer: the model's.
        rows: the examples.
        data: longest example; None where nothing is cut.
        labels: answers of every example; its references when None.

    Returns:
        One limit each, at least 1; None where nothing is cut.

    Raises:
        ValueError: an answer alone fills ``data.max_length``.
    """
    if data is None or not data.truncate_prompt:
        return None
    answers = longest_answers(tokenizer, rows, labels)
    for i, num in enumerate(answers):
        if num >= data.max_length:
            raise ValueError(
                f"example {i} of those that are scored: its answer has {num} tokens and is never cut, but "
                f"data.max_length={data.max_length} leaves no room for a prompt; raise data.max_length above {num}"
            )
    return [max(1, data.max_length - num - 1) for num in answers]


def encoded_prompts(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, data: DataConfig, limits: Sequence[int] | None
) -> tuple[list[list[int]], int]:
    """Prompts as they are answered, and tokens of the longest when it is routed; how many are cut is logged."""
    prompts = [row["prompt"] for row in rows]
    routed = encode_prompt(prompts, tokenizer, data.max_length if data.truncate_prompt else None)
    scored = routed if limits is None else encode_prompt(prompts, tokenizer, limits)
    num_cut = sum(len(cut) < len(ids) for cut, ids in zip(scored, routed, strict=True))
    if num_cut:
        say_cut(num_cut, len(rows), data.max_length, "prompts that are scored")
    return scored, max(map(len, routed))


def generation_caps(
    prompts: Sequence[Sequence[int]], answer_tokens: int, cfg: EvalConfig, data: DataConfig | None
) -> list[int]:
    """Tokens that are generated for each prompt at most.

    Args:
        prompts: token ids, as they are answered.
        answer_tokens: of the longest reference of the whole task, with its end token; one more is generated.
        cfg: a cap, where there is one, holds for all.
        data: with ``truncate_prompt`` a prompt and its answer are no longer than ``max_length`` together.
    """
    most = cfg.max_new_tokens or answer_tokens + 1
    if cfg.max_new_tokens is not None or data is None or not data.truncate_prompt:
        return [most] * len(prompts)
    return [min(most, data.max_length - len(ids)) for ids in prompts]


def tokens_needed(tokenizer: PreTrainedTokenizerBase, task: Task, cfg: EvalConfig, data: DataConfig) -> int:
    """Longest sequence that a model reads when a task's test examples are scored, and when their prompts are routed.

    Raises:
        ValueError: a prompt has no tokens, the chat template cannot be rendered, or as ``prompt_limits`` and ``load_metric``.
    """
    metric = load_metric(task)
    if metric.compare is None:
        return int(metric.module.tokens_needed(tokenizer, task, data))
    rows = task.test.to_list()
    scored, routed = encoded_prompts(tokenizer, rows, data, prompt_limits(tokenizer, rows, data))
    caps = generation_caps(scored, longest_answer(tokenizer, rows), cfg, data)
    # The last token is predicted, not read.
    return max(routed, *(len(ids) + cap - 1 for ids, cap in zip(scored, caps, strict=True)))
