"""The tokens that scoring needs: a model with just as many positions is scored, one with fewer is refused."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data import Task
from trace_dist.evaluation import evaluate_task
from trace_dist.evaluation.lengths import tokens_needed

ROWS = [("abc" * 5, "ab"), ("fgh", "a"), ("d", "abcdefgh")]


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
    rows = datasets.Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in ROWS])
    choices = ["ab", "a", "abcdefgh"] if metric == "choice" else None
    task = Task("t", rows, rows, choices, metric, majority_percent=0, overlap_percent=0)
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
