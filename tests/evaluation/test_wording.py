"""A model that says exactly what training teaches scores 100 %, whatever the chat template writes around an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data.templates import KINDS, bpe_tokenizer

from trace_dist.data import Pair, encode_pairs
from trace_dist.evaluation import exact_match
from trace_dist.evaluation.wording import Wording

ANSWERS = [
    "four",
    " 4\n 5 ",
    "<think>because</think>42",
    "[THINK]because[/THINK]42",
    "four<|end|>",
    "a <think> b",
]


class Oracle(torch.nn.Module):
    """A model without a cache that continues each trained prompt by its trained answer."""

    def __init__(self, pairs: list[Pair], vocab_size: int) -> None:
        super().__init__()
        self.pairs, self.vocab_size = pairs, vocab_size
        self.weight = torch.nn.Parameter(torch.zeros(1))
        text = SimpleNamespace(max_position_embeddings=999, vocab_size=vocab_size)
        self.config = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: text)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, (ids, mask) in enumerate(
            zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)
        ):
            real = [token for token, seen in zip(ids, mask, strict=True) if seen]
            pair = next(pair for pair in self.pairs if real[: len(pair.prompt)] == pair.prompt)
            said = len(real) - len(pair.prompt)
            logits[row, mask.index(False) - 1 if False in mask else -1, (pair.answer[said:] or [0])[0]] = 1
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_what_training_teaches_scores_all(kind: str) -> None:
    tokenizer = bpe_tokenizer(KINDS[kind].template if kind in KINDS else None)
    prompts = [f"what is {'two plus ' * i}two?" for i in range(len(ANSWERS))]
    oracle = Oracle(encode_pairs(prompts, ANSWERS, tokenizer), len(tokenizer))
    examples = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, ANSWERS, strict=True)]
    assert exact_match(oracle, tokenizer, examples, batch_size=4).per_example == [1.0] * len(ANSWERS)
    wrong = [{**example, "answer": "five"} for example in examples]
    assert exact_match(oracle, tokenizer, wrong, batch_size=4, max_new_tokens=20).value == 0


def test_thoughts_are_not_compared_but_answers_are() -> None:
    wording = Wording.of(bpe_tokenizer(KINDS["opens_block"].template))
    for text in ("<think>two and two</think>\n\nfour<eos>", "[THINK]two[/THINK]four", "four"):
        ids = wording.tokenizer(text)["input_ids"]
        assert wording.said(ids) == "four"
    assert wording.taught("<think>else</think>four") == "four"
    assert wording.taught("four<|end|> five") == "four"
    plain = Wording.of(bpe_tokenizer(None))
    assert plain.taught("<think>a</think>b") == "<think>a</think>b"  # a text like any other
