"""Decoding and likelihoods of every kind of model, in padded batches, against one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evaluation.families import FAMILIES, tiny
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from trace_dist.data import Pair
from trace_dist.evaluation import decode, greedy_decode, log_likelihoods

CAP = 6
PROMPTS = [[5, 9, 33, 41, 7], [60, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31], [70, 71]]


def generated(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The reference: unbatched, by transformers, without the stop token.

    Of models whose ``generate`` gives other positions than those of training, by whole forward passes.
    """
    if model.config.model_type == "roberta":
        return continued(model, prompt)
    ids = torch.tensor([prompt])
    call: Any = model.generate
    output = call(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=CAP, eos_token_id=1
    )
    new = output[0, len(prompt) :].tolist()
    return new[: new.index(1)] if 1 in new else new


def continued(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The likeliest tokens, each by a pass over the whole text as in training."""
    row = list(prompt)
    for _ in range(CAP):
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
        if best == 1:
            break
        row.append(best)
    return row[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_as_generate_does(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(family)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    assert len({tuple(output) for output in expected}) > 2  # the outputs tell prompts apart
    assert greedy_decode(model, tokenizer, PROMPTS, batch_size=4, max_new_tokens=CAP) == expected


# CPM-Ant's prompt sees all of itself, so it has no likelihood from left to right.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"cpmant"}))
def test_likelihoods_do_not_depend_on_the_batch(family: str) -> None:
    model = tiny(family)
    pairs = [Pair(prompt, [7, 8, 9][: 1 + i % 3]) for i, prompt in enumerate(PROMPTS)]
    alone = []
    for prompt, answer in pairs:
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
        alone.append(sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(answer)))
    assert log_likelihoods(model, pairs, batch_size=4, pad_id=0) == pytest.approx(alone, rel=1e-4, abs=1e-3)


def test_decoding_without_a_cache_is_said_once(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    decode._say_slow.cache_clear()
    for family in ("llama", "mamba"):
        model = tiny(family)
        for _ in range(2):
            greedy_decode(model, tokenizer, PROMPTS, batch_size=2, max_new_tokens=2)
    assert [
        record.getMessage().split()[0] for record in caplog.records if record.name.startswith("trace_dist")
    ] == ["MambaForCausalLM"]


def test_what_does_not_continue_a_text_is_refused_before_it_runs(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    masked = XLNetLMHeadModel(XLNetConfig(vocab_size=97, d_model=16, n_layer=1, n_head=2, d_inner=16))
    for model in (encoder_decoder, masked):
        model.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
        with pytest.raises(ValueError, match=r"does not continue the text.*give a causal LM"):
            greedy_decode(model, tokenizer, PROMPTS, batch_size=2, max_new_tokens=CAP)
        with pytest.raises(ValueError, match="does not continue the text"):
            log_likelihoods(model, [Pair([5], [6])], batch_size=1, pad_id=0)


@pytest.mark.parametrize("prompts", [[], [[5], []]])
def test_empty_prompts_are_refused(prompts: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="are empty, each must hold a token"):
        greedy_decode(tiny("llama"), tokenizer, prompts, batch_size=2, max_new_tokens=CAP)
