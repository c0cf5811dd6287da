"""Choices and bits per byte against sums over single, unpadded forward passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data import Pair, Task
from trace_dist.evaluation import (
    answer_bits_per_byte,
    bits_per_byte,
    choice_accuracy,
    evaluate_task,
    exact_match,
    likelihood,
    log_likelihoods,
)

CHOICES = ["a", "ab", "hello"[:2], "g h"]


def reference(model: torch.nn.Module, context: list[int], scored: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + scored])).logits[0].double()
    log_p = logits.log_softmax(-1)
    return sum(float(log_p[len(context) + i - 1, token]) for i, token in enumerate(scored))


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


PAIRS = [
    Pair([2], [3]),
    Pair([2, 3, 4, 5], [6, 1]),
    Pair([7, 2], [8] * 9),
    Pair([5] * 20, []),
    Pair([3], [1]),
]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_log_likelihoods(model: LlamaForCausalLM, batch_size: int) -> None:
    found = log_likelihoods(model, PAIRS, batch_size=batch_size, pad_id=0)
    assert found == pytest.approx([reference(model, *pair) for pair in PAIRS], abs=2e-4)


def test_padding_does_not_shift_absolute_positions() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64, "vocab_size": 11}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=1.0)).eval()
    found = log_likelihoods(model, PAIRS, batch_size=5, pad_id=0)
    assert found == pytest.approx([reference(model, *pair) for pair in PAIRS], abs=2e-4)


def test_batches_are_cut_to_the_memory_of_their_logits(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 11 * 4 * 2)  # two rows of 4 scored positions
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    log_likelihoods(model, [Pair([2], [3, 4, 5, 6])] * 5, batch_size=100, pad_id=0)
    assert rows == [2, 2, 1]


def test_choice_accuracy_picks_the_likeliest_whole_answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = ["abc", "g", "hh f", "deadbeef", "cafe", "a bad cab", "f"]
    best = []
    for prompt in prompts:
        scores = [reference(model, ids(tokenizer, prompt), [*ids(tokenizer, c), 1]) for c in CHOICES]
        best.append(CHOICES[scores.index(max(scores))])
    assert len(set(best)) > 1
    right = [i != 2 for i in range(len(prompts))]
    answers = [b if ok else next(c for c in CHOICES if c != b) for b, ok in zip(best, right, strict=True)]
    examples = [{"prompt": p, "answer": f"{a} "} for p, a in zip(prompts, answers, strict=True)]
    score = choice_accuracy(model, tokenizer, examples, CHOICES, batch_size=5)
    assert score.per_example == [float(ok) for ok in right]
    assert score.answers == best
    assert score.value == pytest.approx(100 * 6 / 7)
    with pytest.raises(ValueError, match="answer 'b' is not one of"):
        choice_accuracy(model, tokenizer, [{"prompt": "a", "answer": "b"}], CHOICES, batch_size=5)


def test_bits_per_byte_of_a_uniform_model_is_log2_of_the_vocabulary(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    score = bits_per_byte(model, tokenizer, ["abc def", "h" * 300], batch_size=4)
    assert score.value == pytest.approx(math.log2(11), rel=1e-6)  # one token per byte
    assert score.per_example == pytest.approx([math.log2(11)] * 2, rel=1e-6)


def test_bits_per_byte_windows_score_each_token_once_with_the_promised_context(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "abc head bag face cab dada hag"
    tokens = [0, *ids(tokenizer, text)]
    whole = -reference(model, tokens[:1], tokens[1:]) / math.log(2) / len(text)
    assert bits_per_byte(model, tokenizer, [text], batch_size=2).value == pytest.approx(whole, rel=1e-5)
    context, stride = 8, 3
    total, begin, size = 0.0, 1, context
    while begin < len(tokens):
        end = min(begin + size, len(tokens))
        total -= reference(model, tokens[max(0, end - 1 - context) : begin], tokens[begin:end])
        begin, size = end, stride
    found = bits_per_byte(model, tokenizer, [text], batch_size=2, max_context=context, stride=stride)
    assert found.value == pytest.approx(total / math.log(2) / len(text), rel=1e-5)
    assert found.value != pytest.approx(whole, rel=1e-3)
    with pytest.raises(ValueError, match="stride=9"):
        bits_per_byte(model, tokenizer, [text], batch_size=2, max_context=8, stride=9)
    with pytest.raises(ValueError, match="example 1: the text is empty"):
        bits_per_byte(model, tokenizer, ["a", ""], batch_size=2)


def test_answer_bits_per_byte_leaves_out_the_end_token(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    examples = [{"prompt": "ab", "answer": "cde"}, {"prompt": "f", "answer": "g"}]
    nats = [
        -reference(model, ids(tokenizer, row["prompt"]), ids(tokenizer, row["answer"])) for row in examples
    ]
    score = answer_bits_per_byte(model, tokenizer, examples, batch_size=2)
    assert score.value == pytest.approx(sum(nats) / math.log(2) / 4, rel=1e-5)
    assert score.per_example == pytest.approx([nats[0] / math.log(2) / 3, nats[1] / math.log(2)], rel=1e-5)


SCORED: list[Any] = [("exact_match",), ("choice", ["a", "ab"]), ("bits_per_byte",)]


def make_task(metric: Any, choices: list[str] | None = None) -> Task:
    test = datasets.Dataset.from_list([{"prompt": p, "answer": a} for p, a in (("abc", "a"), ("fgh", "ab"))])
    return Task("t", test, test, choices, metric, majority_percent=50.0, overlap_percent=100.0)


def test_evaluate_task_uses_the_tasks_metric(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = make_task("exact_match").test.to_list()
    cfg = EvalConfig(batch_size=2)
    assert evaluate_task(model, tokenizer, make_task("exact_match"), cfg) == exact_match(
        model, tokenizer, rows, batch_size=2
    )
    assert evaluate_task(model, tokenizer, make_task("choice", ["a", "ab"]), cfg) == choice_accuracy(
        model, tokenizer, rows, ["a", "ab"], batch_size=2
    )
    assert evaluate_task(model, tokenizer, make_task("bits_per_byte"), cfg) == answer_bits_per_byte(
        model, tokenizer, rows, batch_size=2
    )
    short = evaluate_task(
        model, tokenizer, make_task("bits_per_byte"), cfg, DataConfig(max_length=5, truncate_prompt=True)
    )
    # 5 - eos - 1, and less the answer of each: "a" leaves two tokens, "ab" one
    cut = [{**row, "prompt": row["prompt"][-left:]} for row, left in zip(rows, (2, 1), strict=True)]
    assert short == answer_bits_per_byte(model, tokenizer, cut, batch_size=2)


def test_padding_that_is_not_embedded(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A token that embeds instead pads; what is masked out changes nothing."""
    cfg, rows = EvalConfig(batch_size=2), make_task("exact_match").test.to_list()
    expected = [evaluate_task(model, tokenizer, make_task(*each), cfg) for each in SCORED]
    tokenizer.add_special_tokens({"pad_token": "<fill>"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    assert [evaluate_task(model, tokenizer, make_task(*each), cfg) for each in SCORED] == expected
    texts = [row["prompt"] for row in rows]
    assert bits_per_byte(model, tokenizer, texts, batch_size=2).num == len(rows)
