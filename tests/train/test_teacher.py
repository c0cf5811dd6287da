"""A model as a teacher: its own greedy answers, and its own probabilities of them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.data.encoding import IGNORE, Pair
from trace_dist.train.soft import SOFT_IDS, SOFT_PROBABILITIES
from trace_dist.train.teacher import teach

VOCABULARY = 23
PAIRS = [
    Pair([1, 5, 6], [7]),
    Pair([1], [2, 3, 4, 9]),
    Pair([1, 8, 8, 8, 8], [10, 2]),
    Pair([3, 3], [20, 21]),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("top", [1, 5, 100])
def test_what_is_said_is_the_models_own(model: LlamaForCausalLM, top: int, batch_size: int) -> None:
    found = teach(model, PAIRS, top=top, batch_size=batch_size, pad_id=0)
    assert model.training
    model.eval()
    for row, (prompt, answer) in zip(found, PAIRS, strict=True):
        assert row["input_ids"] == prompt + answer
        assert row["labels"] == [IGNORE] * len(prompt) + answer
        assert row["num_answer_tokens"] == len(answer)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        expected = logits[len(prompt) - 1 : -1].softmax(1).topk(min(top, VOCABULARY))
        assert row[SOFT_IDS] == expected.indices.tolist()
        torch.testing.assert_close(
            torch.tensor(row[SOFT_PROBABILITIES]), expected.values, rtol=1e-4, atol=1e-6
        )
    model.train()
