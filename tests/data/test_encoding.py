from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from trace_dist.config import DataConfig
from trace_dist.data import IGNORE, check_context, encode, encode_pairs, encode_prompt, pad_id, stop_ids
from trace_dist.data.examples import as_dataset


def rows(*pairs: tuple[str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in pairs])


def test_plain_text_is_prompt_answer_eos(plain: PreTrainedTokenizerFast) -> None:
    (encoded,) = encode(rows(("2+2=", "4\n 5")), plain, DataConfig())
    assert plain.decode(encoded["input_ids"]) == "2+2=4\n 5<eos>"
    learned = [i for i in encoded["labels"] if i != IGNORE]
    assert plain.decode(learned) == "4\n 5<eos>"
    assert encoded["labels"][:4] == [IGNORE] * 4
    assert encoded["num_answer_tokens"] == len(learned) == 5


def test_chat_template_learns_the_answer_and_its_end_token_only(chat: PreTrainedTokenizerFast) -> None:
    (encoded,) = encode(rows(("hi", "yo")), chat, DataConfig())
    assert chat.decode(encoded["input_ids"]) == "<bos>hi<sep>yo<end>"  # without the template's last newline
    assert chat.decode([i for i in encoded["labels"] if i != IGNORE]) == "yo<end>"
    assert encode_prompt(["hi"], chat) == [encoded["input_ids"][:4]]


def test_stop_ids_are_the_end_of_turn_then_eos(
    chat: PreTrainedTokenizerFast, plain: PreTrainedTokenizerFast
) -> None:
    assert chat.convert_ids_to_tokens(stop_ids(chat)) == ["<end>", "<eos>"]
    assert plain.convert_ids_to_tokens(stop_ids(plain)) == ["<eos>"]
    plain.eos_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        stop_ids(plain)


def test_template_that_rewrites_the_prompt_falls_back_to_separate_parts(
    rewriting: PreTrainedTokenizerFast,
) -> None:
    (pair,) = encode_pairs(["hi"], ["yo"], rewriting)
    assert rewriting.decode(pair.prompt) == "<bos>hi<sep>think"
    assert rewriting.decode(pair.answer) == "yo<end>"
    assert [pair.prompt] == encode_prompt(["hi"], rewriting)


def test_merge_across_the_seam_keeps_the_prompt_tokens() -> None:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<eos>"], show_progress=False)
    backend.train_from_iterator(["abcd abcd abcd"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    assert len(tokenizer("abcd")["input_ids"]) == 1  # so that the prompt's "ab" would vanish into it
    (pair,) = encode_pairs(["ab"], ["cd"], tokenizer)
    assert [pair.prompt] == encode_prompt(["ab"], tokenizer)
    assert tokenizer.decode(pair.prompt) == "ab"
    assert tokenizer.decode(pair.answer) == "cd<eos>"


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize(
    ("prompt", "text", "trained"),
    [
        ("2+2=<eos>", "2+2=<eos>4<eos>", "4<eos>"),
        ("<eos>", "<eos>4<eos>", "4<eos>"),
        ("2+2=", "2+2=4<eos>", "4<eos>"),
        ([("user", "2+2"), ("assistant", "is")], "2+2is<eos>4<eos>", "is<eos>4<eos>"),
        ([("user", "2+2"), ("assistant", "is"), ("user", "")], "2+2is<eos>4<eos>", "is<eos>4<eos>"),
    ],
)
def test_a_prompt_may_end_with_the_end_token(
    prompt: Any, text: str, trained: str, closes: bool, plain: PreTrainedTokenizerFast
) -> None:
    """Whether the tokenizer closes each text with one or not; the answer is trained whole, and asked for behind it."""
    if closes:
        ends = [("<eos>", plain.eos_token_id)]
        plain.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", None, ends)
        assert plain("a")["input_ids"][-1] == plain.eos_token_id
    if not isinstance(prompt, str):
        prompt = [{"role": role, "content": said} for role, said in prompt]
    encoded = encode(as_dataset([{"prompt": prompt, "answer": "4"}]), plain, DataConfig(max_length=64))[0]
    assert plain.decode(encoded["input_ids"]) == text
    assert plain.decode([label for label in encoded["labels"] if label != IGNORE]) == trained
    assert plain.decode(encode_prompt([prompt], plain)[0]) == text.removesuffix("4<eos>")


def test_too_long_prompt_is_an_error_that_names_the_example(plain: PreTrainedTokenizerFast) -> None:
    data = rows(("ab", "c"), ("abcdefgh", "ij"))
    with pytest.raises(
        ValueError, match=r"example 1: prompt 8 \+ answer 3 .*max_length=10.*truncate_prompt=true"
    ):
        encode(data, plain, DataConfig(max_length=10))
    encode(data, plain, DataConfig(max_length=11))


def test_truncation_cuts_the_prompt_on_the_left_and_never_the_answer(
    chat: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="trace_dist")
    encoded = encode(
        rows(("ab", "c"), ("abcdefgh", "ij")), chat, DataConfig(max_length=8, truncate_prompt=True)
    )
    assert chat.decode(encoded[0]["input_ids"]) == "<bos>ab<sep>c<end>"
    assert chat.decode(encoded[1]["input_ids"]) == "<bos>fgh<sep>ij<end>"
    assert encoded[1]["num_answer_tokens"] == 3
    assert "cut 1 of 2 prompts to data.max_length=8" in caplog.text


@pytest.mark.parametrize("truncate", [False, True])
def test_answer_that_fills_the_length_is_always_an_error(
    plain: PreTrainedTokenizerFast, truncate: bool
) -> None:
    with pytest.raises(ValueError, match=r"answer has 4 tokens and is never cut.*above 4"):
        encode(rows(("a", "bcd")), plain, DataConfig(max_length=4, truncate_prompt=truncate))


def test_prompt_without_tokens_is_an_error(
    plain: PreTrainedTokenizerFast, chat: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="example 0: prompt '' has no tokens"):
        encode_prompt([""], plain)
    assert chat.decode(encode_prompt([""], chat)[0]) == "<bos><sep>"


def test_second_encoding_reads_the_cache(plain: PreTrainedTokenizerFast, own_cache: Path) -> None:
    data = rows(("ab", "c"), ("abc", "d"))
    first = encode(data, plain, DataConfig())
    files = {file: file.stat().st_mtime_ns for file in own_cache.rglob("*.arrow")}
    second = encode(rows(("ab", "c"), ("abc", "d")), plain, DataConfig())
    assert len(files) == 1
    assert {file: file.stat().st_mtime_ns for file in own_cache.rglob("*.arrow")} == files
    assert first.to_list() == second.to_list()
    plain.eos_token = "<end>"  # another tokenizer is another file
    assert encode(data, plain, DataConfig())[0]["input_ids"][-1] == plain.convert_tokens_to_ids("<end>")


def test_processes_agree_and_errors_cross_them(plain: PreTrainedTokenizerFast) -> None:
    data = rows(*[("p" * i, "a") for i in range(1, 12)])
    assert (
        encode(data, plain, DataConfig(num_proc=2)).to_list() == encode(data, plain, DataConfig()).to_list()
    )
    with pytest.raises(ValueError, match="example 9: prompt 10"):
        encode(data, plain, DataConfig(num_proc=2, max_length=11))


def test_check_context() -> None:
    config = LlamaConfig(max_position_embeddings=64)
    check_context(64, config)
    with pytest.raises(ValueError, match=r"65 tokens do not fit the model's 64 positions.*at most 64"):
        check_context(65, config)


def test_pad_id_falls_back_to_eos(plain: PreTrainedTokenizerFast) -> None:
    assert pad_id(plain) == 0
    plain.pad_token = None
    assert pad_id(plain) == plain.eos_token_id


def test_a_text_that_the_tokenizer_cannot_read_is_named() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert encode_prompt(["a b"], tokenizer) == [[0, 1]]
    with pytest.raises(ValueError, match=r"^'b c': the tokenizer cannot read it .*unk_token"):
        encode_prompt(["a b", "b c"], tokenizer)
