"""A model as a teacher: its own greedy answers, and its own probabilities of them."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trace_dist.data.encoding import IGNORE, Pair
from trace_dist.train.soft import SOFT_IDS, SOFT_PROBABILITIES
from trace_dist.train.teacher import answer, teach

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
    for row, (prompt, said) in zip(found, PAIRS, strict=True):
        assert row["input_ids"] == prompt + said
        assert row["labels"] == [IGNORE] * len(prompt) + said
        assert row["num_answer_tokens"] == len(said)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + said])).logits[0]
        expected = logits[len(prompt) - 1 : -1].softmax(1).topk(min(top, VOCABULARY))
        assert row[SOFT_IDS] == expected.indices.tolist()
        torch.testing.assert_close(
            torch.tensor(row[SOFT_PROBABILITIES]), expected.values, rtol=1e-4, atol=1e-6
        )
    model.train()


def test_an_answer_has_its_end_token_unless_it_was_cut(model: LlamaForCausalLM) -> None:
    """Where the model says it; the ids are those of ``generate``."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w2"
    )
    prompts = [[1, first, second] for first in range(3, 13) for second in (4, 9)]
    found = answer(model, tokenizer, prompts, batch_size=7, max_new_tokens=3)
    model.eval()
    ended = 0
    for prompt, pair in zip(prompts, found, strict=True):
        assert pair.prompt == prompt
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0
        )[0, len(prompt) :].tolist()
        said = expected[: expected.index(2) + 1] if 2 in expected else expected
        assert pair.answer == said
        ended += said[-1] == 2
    model.train()
    assert 0 < ended < len(prompts)
