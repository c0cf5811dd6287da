from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from trace_dist.data import encode_prompt
from trace_dist.evaluation import exact_match, greedy_decode

CAP = 9


def prompts_of_odd_lengths(num: int = 23) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefgh", k=draw.choice([1, 2, 3, 5, 8, 13]))) for _ in range(num)]


def generated(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The reference: unbatched, by transformers, without the stop token."""
    ids = torch.tensor(encode_prompt([prompt], tokenizer))
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=CAP,
        eos_token_id=1,
        pad_token_id=0,
    )
    new = output[0, ids.shape[1] :].tolist()
    return new[: new.index(1)] if 1 in new else new


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_equals_unbatched_generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    model.eval()
    prompts = prompts_of_odd_lengths()
    expected = [generated(model, tokenizer, prompt) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) > 1  # some stop early
    assert CAP in map(len, expected)  # and some reach the cap
    ids = encode_prompt(prompts, tokenizer)
    assert greedy_decode(model, tokenizer, ids, batch_size=batch_size, max_new_tokens=CAP) == expected


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "lora"])
def test_other_families_and_wrappers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    wide: dict[str, Any] = {**sizes, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    other: Any
    if family == "gpt2":
        other = GPT2LMHeadModel(
            GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=64, initializer_range=1.0, **sizes)
        )
    elif family == "gpt_neox":
        other = GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=40, initializer_range=1.0, **wide))
    elif family == "opt":
        other = OPTForCausalLM(OPTConfig(ffn_dim=40, word_embed_proj_dim=24, init_std=1.0, **wide))
    else:
        lora = LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        other = get_peft_model(model, lora)
    other.eval()
    prompts = prompts_of_odd_lengths(11)
    expected = [generated(other, tokenizer, prompt) for prompt in prompts]
    ids = encode_prompt(prompts, tokenizer)
    assert greedy_decode(other, tokenizer, ids, batch_size=4, max_new_tokens=CAP) == expected
    assert len({tuple(tokens) for tokens in expected}) > 3  # the outputs tell prompts apart


def test_exact_match_counts_stripped_equal_texts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.eval()
    prompts = prompts_of_odd_lengths()
    outputs = [generated(model, tokenizer, prompt) for prompt in prompts]
    texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    right = [i % 3 > 0 for i in range(len(prompts))]
    examples = [
        {"prompt": prompt, "answer": f" {text} " if ok else f"{text}x"}
        for prompt, text, ok in zip(prompts, texts, right, strict=True)
    ]
    score = exact_match(model, tokenizer, examples, batch_size=5, max_new_tokens=CAP)
    assert score.per_example == [float(ok) for ok in right]
    assert score.answers == [text.strip() for text in texts]
    assert score.value == pytest.approx(100 * sum(right) / len(right))
    assert score.num == len(prompts)


def test_cap_is_the_longest_reference_with_its_end_token_and_one_more(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = next(p for p in prompts_of_odd_lengths() if len(generated(model.eval(), tokenizer, p)) == CAP)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    examples = [{"prompt": prompt, "answer": "ab"}, {"prompt": prompt, "answer": "a"}]
    assert exact_match(model, tokenizer, examples, batch_size=2).value == 0
    assert len(calls) == 4  # "ab", eos, 1


def test_training_mode_is_restored_and_dropout_is_off(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.train()
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    greedy_decode(model, tokenizer, [[2]], batch_size=1, max_new_tokens=1)
    assert modes == [False]
    assert model.training


def test_errors(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no examples"):
        exact_match(model, tokenizer, [], batch_size=1)
    example = {"prompt": "a" * 62, "answer": "a"}
    exact_match(model, tokenizer, [example], batch_size=1)  # 62 + "a", eos, and one that is not read
    with pytest.raises(ValueError, match="65 tokens do not fit the model's 64 positions"):
        exact_match(model, tokenizer, [{**example, "prompt": "a" * 63}], batch_size=1)
    exact_match(model, tokenizer, [{**example, "prompt": "a" * 90}], batch_size=1, max_prompt_tokens=62)
    with pytest.raises(ValueError, match=r"eval\.max_new_tokens=0"):
        exact_match(model, tokenizer, [example], batch_size=1, max_new_tokens=0)
