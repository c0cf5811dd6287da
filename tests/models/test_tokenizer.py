"""The character tokenizer and the tiny Llama."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trace_dist.config import TinyConfig
from trace_dist.models.loading import load_model, load_tokenizer
from trace_dist.models.tiny import MAX_POSITIONS, build_tiny
from trace_dist.models.tokenizer import BOS_ID, EOS_ID, PAD_ID, SEP_ID, UNK_ID, char_tokenizer, common_affixes

ROTATE = "Rotate the matrix below by {} degrees clockwise:\n{} {}\n{} {}\n"
PROMPTS = {
    "reverse": [f"Spell this word backward: {word}" for word in ("stop", "star", "stew")],
    "sum": [f"State the answer: {a} + {b} =" for a, b in ((1, 2), (3, 4))],
    "rotate": [ROTATE.format(90, *cells) for cells in ((1, 2, 3, 4), (5, 6, 7, 8))],
    "rotate-any": [ROTATE.format(angle, 1, 2, 3, 4) for angle in (90, 180)],
}
ANSWERS = ["pots", "rats", "3", "3 1\n4 2", "naïve"]
TOKENIZER = char_tokenizer(PROMPTS, ANSWERS)


def render(prompt: str, answer: str | None = None) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    rendered = TOKENIZER.apply_chat_template(messages, add_generation_prompt=answer is None, return_dict=True)
    return rendered["input_ids"]


def test_affixes_are_cut_to_whole_words():
    assert common_affixes(PROMPTS["reverse"]) == ("Spell this word backward: ", "")
    assert common_affixes(PROMPTS["sum"]) == ("State the answer: ", " =")
    assert common_affixes(["same text", "same text"]) == ("same ", "")
    assert common_affixes(["aa: x", "aa: x aa: x"]) == ("aa: ", "")


def test_constant_wording_is_one_token():
    tokens = TOKENIZER.convert_ids_to_tokens(render(PROMPTS["sum"][0], "3"))
    assert tokens == ["<bos>", "State the answer: ", "1", " ", "+", " ", "2", " =", "<sep>", "3", "<eos>"]


def test_the_longest_wording_wins():
    """'Rotate ... by 90 degrees clockwise:\\n' begins with rotate-any's 'Rotate ... by '."""
    tokens = TOKENIZER.tokenize(PROMPTS["rotate"][0])
    assert tokens[0] == "Rotate the matrix below by 90 degrees clockwise:\n"
    assert TOKENIZER.tokenize(PROMPTS["rotate-any"][1])[0] == "Rotate the matrix below by "


def test_the_generation_prompt_is_a_prefix_of_the_conversation():
    whole = render(PROMPTS["reverse"][0], "pots")
    prompt = render(PROMPTS["reverse"][0])
    assert whole[: len(prompt)] == prompt
    assert (whole[0], prompt[-1], whole[-1]) == (BOS_ID, SEP_ID, EOS_ID)
    assert (TOKENIZER.pad_token_id, TOKENIZER.unk_token_id) == (PAD_ID, UNK_ID)


def test_the_answer_is_marked_for_the_loss():
    messages = [{"role": "user", "content": "1 + 2"}, {"role": "assistant", "content": "3"}]
    rendered = TOKENIZER.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert rendered["assistant_masks"] == [0] * 7 + [1, 1]


@given(st.text(alphabet=st.sampled_from([chr(i) for i in range(32, 127)] + ["\n", "\t", "ï"])))
def test_text_comes_back_exactly(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text
    assert UNK_ID not in TOKENIZER(text)["input_ids"] or "<unk>" in text


@pytest.mark.parametrize("answer", [*ANSWERS, " leading", "trailing \n", "two  spaces", "it 's , n't ."])
def test_answers_come_back_exactly_from_a_conversation(answer):
    prompt = render(PROMPTS["reverse"][0])
    generated = render(PROMPTS["reverse"][0], answer)[len(prompt) :]
    assert TOKENIZER.decode(generated, skip_special_tokens=True) == answer


def test_ids_do_not_depend_on_the_order_of_tasks():
    other = char_tokenizer(dict(reversed(PROMPTS.items())), reversed(ANSWERS))
    assert other.get_vocab() == TOKENIZER.get_vocab()


def test_no_prompts_is_an_error():
    with pytest.raises(ValueError, match="holds no prompt"):
        char_tokenizer({"a": []}, [])


def test_saved_beside_a_tiny_llama_it_loads_the_same(tmp_path):
    model = build_tiny(
        TinyConfig(hidden_size=36, num_heads=3, num_layers=1, intermediate_size=50), len(TOKENIZER), 1
    )
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == TOKENIZER.get_vocab()
        assert loaded.chat_template == TOKENIZER.chat_template
        assert loaded.padding_side == "left"
        for text in [*ANSWERS, *PROMPTS["rotate"]]:
            assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
            assert loaded.decode(loaded(text)["input_ids"]) == text
    batch = load_tokenizer(tmp_path)(["1 + 2 =", "1"], padding=True, return_tensors="pt")
    generated = load_model(tmp_path).generate(**batch, max_new_tokens=3, do_sample=False)
    assert generated.shape[0] == 2


def test_the_tiny_llama_is_the_recipe():
    before = torch.get_rng_state()
    model = build_tiny(TinyConfig(), 64, seed=3)
    assert torch.equal(before, torch.get_rng_state()), "the global random state moved"
    assert 0.85e6 < model.num_parameters() < 0.87e6
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert model.config.max_position_embeddings == MAX_POSITIONS == 256
    same, other = (build_tiny(TinyConfig(), 64, seed=seed) for seed in (3, 4))
    assert torch.equal(model.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    narrow = build_tiny(dataclasses.replace(TinyConfig(), hidden_size=64), 64, seed=3)
    assert narrow.model.layers[0].mlp.up_proj.weight.shape == (384, 64)
