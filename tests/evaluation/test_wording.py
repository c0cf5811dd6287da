"""A model that says exactly what training teaches scores 100 %, whatever the chat template writes around an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data.templates import KINDS, bpe_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

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


def sentencepiece(*steps: normalizers.Normalizer) -> Any:
    """A tokenizer whose pieces begin with the sign for a space, over the letters of the test."""
    vocab = {"<unk>": 0, "<eos>": 1, **{sign: i + 2 for i, sign in enumerate("\u2581abcdefi\u00e9\u00f1")}}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(list(steps))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def byte_level(normalizer: normalizers.Normalizer) -> Any:
    tokenizer = bpe_tokenizer(None)
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


NFKC = normalizers.NFKC()
SPACES = normalizers.Replace(" ", "\u2581")


@pytest.mark.parametrize(
    ("tokenizer", "references"),
    [
        (byte_level(normalizers.NFC()), ["cafe\u0301", "\u09b8\u09ae\u09df", "\u095c two", "\ufb01ne", " a  b "]),
        (byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])), ["caf\u00e9"]),
        (byte_level(normalizers.Lowercase()), ["Two"]),
        (sentencepiece(normalizers.Prepend("\u2581"), SPACES), ["ab cd", " a  b"]),
        (sentencepiece(NFKC, normalizers.Replace(Regex(" {2,}"), " "), SPACES), ["e\u0301  a", "\ufb01 n\u0303"]),
    ],
)  # fmt: skip
def test_references_are_normalised_as_tokens_are(tokenizer: Any, references: list[str]) -> None:
    """What is decoded of a trained answer is what is compared with it."""
    wording = Wording.of(tokenizer)
    for reference in references:
        (pair,) = encode_pairs(["a"], [reference], tokenizer)
        assert wording.said(pair.answer[:-1]) == wording.taught(reference), reference
    assert wording.taught("ab") != wording.taught("abc")
