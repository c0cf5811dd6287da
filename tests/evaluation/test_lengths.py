"""The tokens that scoring needs: a model with just as many positions is scored, one with fewer is refused."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from evaluation.families import tiny
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data import Task
from trace_dist.data.encoding import encode_prompt, say_cut
from trace_dist.evaluation import evaluate_task, greedy_decode
from trace_dist.evaluation.lengths import prompt_limits, tokens_needed

ROWS = [("abc" * 5, "ab"), ("fgh", "a"), ("d", "abcdefgh")]
CUT = DataConfig(max_length=14, truncate_prompt=True)


def make_task(metric: Any, pairs: list[tuple[str, str]]) -> Task:
    rows = datasets.Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in pairs])
    choices = sorted({answer for _, answer in pairs}) if metric == "choice" else None
    return Task("t", rows, rows, choices, metric, majority_percent=0, overlap_percent=0)


@pytest.mark.parametrize(
    ("metric", "evaluation", "data", "needed"),
    [
        # 15, "abcdefgh", its end token, one more that is not read
        ("exact_match", EvalConfig(), DataConfig(), 15 + 9 + 1 - 1),
        ("exact_match", EvalConfig(max_new_tokens=4), DataConfig(), 15 + 4 - 1),
        ("exact_match", EvalConfig(), DataConfig(max_length=14, truncate_prompt=True), 14),
        ("exact_match", EvalConfig(max_new_tokens=1), DataConfig(max_length=14, truncate_prompt=True), 14),
        ("choice", EvalConfig(), DataConfig(), 15 + 9 - 1),
        # 15 and "ab", of which the last is not read
        ("bits_per_byte", EvalConfig(), DataConfig(), 15 + 2 - 1),
    ],
)
def test_tokens_needed(
    tokenizer: PreTrainedTokenizerFast, metric: Any, evaluation: EvalConfig, data: DataConfig, needed: int
) -> None:
    task = make_task(metric, ROWS)
    assert tokens_needed(tokenizer, task, evaluation, data) == needed
    for positions in (needed, needed - 1):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=11,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=positions,
            )
        )
        if positions == needed or data.truncate_prompt:  # what is cut may be read by the router alone
            evaluate_task(model, tokenizer, task, evaluation, data)
        else:
            with pytest.raises(
                ValueError, match=f"{needed} tokens do not fit the model's {positions} positions"
            ):
                evaluate_task(model, tokenizer, task, evaluation, data)


@pytest.mark.parametrize(
    ("metric", "limits"),
    [("exact_match", [14 - 3 - 1, 14 - 2 - 1, 14 - 9 - 1]), ("choice", [14 - 9 - 1] * 3)],
)
def test_prompts_are_cut_by_their_own_answers(
    tokenizer: PreTrainedTokenizerFast, metric: str, limits: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """All labels are read after each prompt; a reference of another example is not."""
    say_cut.cache_clear()
    pairs = [("abc" * 5, answer) for _, answer in ROWS]
    task = make_task(metric, pairs)
    rows = task.test.to_list()
    assert prompt_limits(tokenizer, rows, CUT, task.choices) == limits
    assert prompt_limits(tokenizer, rows, DataConfig(max_length=14)) is None
    tokens_needed(tokenizer, task, EvalConfig(), CUT)
    assert "cut 3 of 3 prompts that are scored to data.max_length=14 tokens" in caplog.text


@pytest.mark.parametrize("metric", ["exact_match", "choice", "bits_per_byte"])
def test_an_answer_that_leaves_no_room_is_refused(tokenizer: PreTrainedTokenizerFast, metric: str) -> None:
    task = make_task(metric, ROWS)
    for length in (10, 9):
        data = DataConfig(max_length=length, truncate_prompt=True)
        if length == 10:
            tokens_needed(tokenizer, task, EvalConfig(), data)
        else:
            with pytest.raises(
                ValueError, match=r"its answer has 9 tokens .* raise data\.max_length above 9"
            ):
                tokens_needed(tokenizer, task, EvalConfig(), data)
    tokens_needed(tokenizer, task, EvalConfig(), DataConfig(max_length=9))


@pytest.mark.parametrize("family", ["llama", "openai-gpt", "falcon_h1", "bloom"])
def test_each_prompt_has_its_own_cap(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Some together would pass the last position of the model."""
    torch.manual_seed(0)
    model = tiny(family)
    model.config.max_position_embeddings = 64
    prompts = [[5 + i % 60 for i in range(num)] for num in (60, 8, 58, 3)]
    caps = [4, 20, 7, 1]
    expected = [
        greedy_decode(model, tokenizer, [prompt], batch_size=1, max_new_tokens=cap)[0]
        for prompt, cap in zip(prompts, caps, strict=True)
    ]
    assert max(map(len, expected)) > 7
    assert greedy_decode(model, tokenizer, prompts, batch_size=4, max_new_tokens=caps) == expected
    with pytest.raises(ValueError, match="65 tokens do not fit"):
        greedy_decode(model, tokenizer, prompts, batch_size=4, max_new_tokens=[6, 20, 7, 1])


def test_a_score_does_not_depend_on_the_other_examples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Prompts of a set with one long reference are asked as they are without it."""
    pairs = [("abcdefgh" * 3, "ab"), ("hgf" * 7, "c")]
    asked: list[list[int]] = []
    for more in ([], [("a", "abcdefgh")]):
        rows = make_task("exact_match", [*pairs, *more]).test.to_list()
        prompts = [row["prompt"] for row in rows]
        asked.append(encode_prompt(prompts, tokenizer, prompt_limits(tokenizer, rows, CUT))[:2])
    assert asked[0] == asked[1]
    score = evaluate_task(
        model, tokenizer, make_task("exact_match", pairs), EvalConfig(), CUT, answer_tokens=9
    )
    whole = make_task("exact_match", [*pairs, ("a", "abcdefgh")])
    assert score.answers == evaluate_task(model, tokenizer, whole, EvalConfig(), CUT).answers[:2]
