"""Decoding and likelihoods of a model on a GPU that is not there (engine/fake_gpu.py): what it reads is taken to the GPU."""

from __future__ import annotations

from typing import Any

import pytest
from engine.fake_gpu import fake_gpu, place
from engine.meta_gpu import META, Count, meta_gpu
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trace_dist.data.encoding import Pair
from trace_dist.evaluation import decode, inputs, likelihood

PROMPTS = [[2, 3, 4], [5], [6, 7, 2, 3], [4, 4], *([2 + i, 9 - i, 3][: 1 + i % 3] for i in range(8))]
CAP = 8
PAIRS = [Pair([2, 3], [4]), Pair([5], [6, 7, 8]), Pair([2, 9, 3, 4], [])]


def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, device: str) -> list[Any]:
    model.set_attn_implementation("eager")
    model = place(model, device)
    return [
        decode.greedy_decode(model, tokenizer, PROMPTS, batch_size=3, max_new_tokens=CAP),
        likelihood.log_likelihoods(model, PAIRS, batch_size=2, pad_id=0),
    ]


def pad_on(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if side == "right":
        for module in (decode, likelihood, inputs):
            monkeypatch.setattr(module, "may_pad_left", lambda _: False)


@pytest.mark.parametrize("padded", ["left", "right"])
def test_answers_of_a_model_on_a_device(
    padded: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those on the CPU; padded on the right too, as for models that keep another state."""
    pad_on(padded, monkeypatch)
    monkeypatch.setattr(decode, "ASKED_EVERY", 3)
    expected = answers(model, tokenizer, "cpu")
    lengths = [len(answer) for answer in expected[0]]
    assert len(set(lengths)) > 1  # some end before anybody asks
    with fake_gpu(monkeypatch):
        found = answers(model, tokenizer, "cuda")
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("padded", ["left", "right"])
def test_a_device_is_waited_for_every_few_tokens(
    padded: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To learn whether all have ended, which they never have here, and for the answers."""
    pad_on(padded, monkeypatch)
    monkeypatch.setattr(decode, "ASKED_EVERY", 3)
    model = model.to(META)
    with meta_gpu(), Count() as count:
        decode.greedy_decode(model, tokenizer, PROMPTS, batch_size=len(PROMPTS), max_new_tokens=CAP)
    assert count.waited("trace_dist.evaluation.decode") == CAP // 3 + 1
