"""Conversations of several turns: every answer is trained as the template writes it, and the last one is asked for."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pytest
from data.conftest import char_tokenizer
from data.templates import KINDS, bpe_tokenizer
from transformers import PreTrainedTokenizerFast

from trace_dist.config import DataConfig, TaskConfig
from trace_dist.data import IGNORE, encode, encode_pairs, encode_prompt, load_examples
from trace_dist.data.encoding import last_pair
from trace_dist.data.template import _say_left_out

TURNS = [
    {"role": "user", "content": "what is two"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "plus four"},
    {"role": "assistant", "content": " 2 "},
    {"role": "user", "content": "hi"},
]
LEADS = {"space_before_answer": " ", "newline_before_answer": "\n"}
SEAMS = ("no_generation_prompt", "text_after_answer", "text_before_end")
"""Templates with a space before an answer, which is part of its first token."""
NOT_WRITTEN = ("upper_case",)
"""Templates that change what was answered."""


def encoded(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, **options: Any
) -> dict[str, Any]:
    rows = datasets.Dataset.from_list([{"prompt": turns, "answer": "four"}])
    (row,) = encode(rows, tokenizer, DataConfig(**options))
    return row


def trained(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts that carry a loss."""
    assert all(label in (IGNORE, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    runs = groupby(row["labels"], key=lambda label: label != IGNORE)
    return [tokenizer.decode(list(run)) for taught, run in runs if taught]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOT_WRITTEN])
def test_every_answer_is_trained_with_its_end_and_nothing_else(kind: str) -> None:
    tokenizer = bpe_tokenizer(KINDS[kind].template)
    row = encoded(TURNS, tokenizer)
    (pair,) = encode_pairs([TURNS], ["four"], tokenizer)
    assert (row["input_ids"], [pair.prompt]) == (pair.prompt + pair.answer, encode_prompt([TURNS], tokenizer))
    assert row["num_answer_tokens"] == sum(label != IGNORE for label in row["labels"])
    assert last_pair(row["input_ids"], row["labels"]) == pair
    end, lead = KINDS[kind].after, LEADS.get(kind, "")
    *earlier, last = trained(row, tokenizer)
    if kind in SEAMS:
        earlier[0] = earlier[0].removeprefix(" ")
    assert last == f"{lead}four{end}"
    if kind == "text_before_end":
        assert earlier == ["four", "<|end|>", " 2 ", "<|end|>"]
    elif kind == "text_after_answer":
        assert earlier == ["four", " 2 "]  # the template ends no turn with a token
    else:
        assert earlier == [f"{lead}four{end}", f"{lead} 2 {end}"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOT_WRITTEN])
def test_the_prompt_is_what_the_template_writes(kind: str) -> None:
    """The text of a conversation's prompt begins with transformers' own rendering; ours may close a thinking block."""
    tokenizer = bpe_tokenizer(KINDS[kind].template)
    rendered = tokenizer.apply_chat_template(
        TURNS, tokenize=False, add_generation_prompt=True, enable_thinking=False, thinking=False
    )
    text = tokenizer.decode(encode_prompt([TURNS], tokenizer)[0])
    alone = tokenizer.decode(encode_prompt(["hi"], tokenizer)[0])
    assert text.startswith(rendered)
    assert text[len(rendered) :] in alone


def test_a_template_that_strips_answers_or_drops_their_thoughts() -> None:
    stripping = (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] | trim }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    tokenizer = bpe_tokenizer(stripping)
    turns = [TURNS[0], {"role": "assistant", "content": "<think>hm</think> four\n"}, *TURNS[2:]]
    assert trained(encoded(turns, tokenizer), tokenizer) == ["four<|end|>", "2<|end|>", "four<|end|>"]


@pytest.mark.parametrize(
    "template",
    [
        KINDS["upper_case"].template,
        "<|start|>{{ messages[-1]['content'] }}{% if add_generation_prompt %}<|end|>{% endif %}",
        # Each text twice, with nothing between the turns.
        "{% for m in messages %}{{ m['content'] }}{% if m.role == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_write_earlier_answers_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="does not write earlier answers as they are"):
        encoded(TURNS, bpe_tokenizer(template))


def test_a_merge_across_the_seam_keeps_the_prompt() -> None:
    """Without tokens of its own between user and assistant, a token may hold letters of both; the prompt's tokens stay."""
    template = "{% for m in messages %}{{ m['content'] }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    tokenizer = bpe_tokenizer(template)
    assert len(tokenizer("hi plus")["input_ids"]) == 2
    turns = [TURNS[0] | {"content": "hi pl"}, TURNS[1] | {"content": "us"}, TURNS[4]]
    row = encoded(turns, tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "hi plus<|end|>hifour<|end|>"
    assert trained(row, tokenizer) == [" plus<|end|>", "four<|end|>"]


def test_without_a_template_eos_ends_each_answer(plain: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "system", "content": "be kind"}, *TURNS]
    row = encoded(turns, plain)
    text = "be kind\n\nwhat is two" + "four<eos>" + "plus four" + " 2 <eos>" + "hi" + "four<eos>"
    assert plain.decode(row["input_ids"]) == text
    assert trained(row, plain) == ["four<eos>", " 2 <eos>", "four<eos>"]


def test_one_user_turn_is_a_plain_prompt(
    chat: PreTrainedTokenizerFast, plain: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (chat, plain, bpe_tokenizer(KINDS["hybrid"].template)):
        turns = [{"role": "user", "content": "hi"}]
        assert encode_pairs([turns], ["yo"], tokenizer) == encode_pairs(["hi"], ["yo"], tokenizer)
        assert encoded(turns, tokenizer)["labels"] == encoded("hi", tokenizer)["labels"]  # type: ignore[arg-type]


def test_what_is_cut_on_the_left_takes_its_labels_along(chat: PreTrainedTokenizerFast) -> None:
    whole = encoded(TURNS, chat)
    for max_length in (12, 20, 30):
        cut = encoded(TURNS, chat, max_length=max_length, truncate_prompt=True)
        assert cut["input_ids"] == [chat.bos_token_id, *whole["input_ids"][1 - max_length :]]
        # The first token is never predicted.
        assert cut["labels"] == [IGNORE, *whole["labels"][1 - max_length :]]
        assert cut["num_answer_tokens"] == sum(label != IGNORE for label in cut["labels"])


def read(tmp_path: Path, *conversations: Any, **options: Any) -> list[dict[str, Any]]:
    for name in ("d.jsonl", "d.test.jsonl"):
        rows = [
            each if isinstance(each, dict) and "role" not in each else {"messages": each}
            for each in conversations
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(TaskConfig(name="t", path=str(tmp_path / "d.jsonl"), **options), seed=0).test


def test_system_turns_stay_and_turns_that_teach_nothing_go(tmp_path: Path) -> None:
    system, answer = {"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}
    user = {"role": "user", "content": "u"}
    expected = [{"prompt": [system, user], "answer": "a"}]
    assert read(tmp_path, [system, user, answer]) == expected
    assert read(tmp_path, [system, answer, user, answer, user]) == expected
    assert read(tmp_path, {"messages": [user, answer], "system": "s"}) == expected
    assert read(tmp_path, {"messages": [system, user, answer], "system": "s"}) == expected
    assert read(tmp_path, {"messages": [user, answer], "system": None}) == [{"prompt": "u", "answer": "a"}]
    sharegpt = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u"},
        {"from": "gpt", "value": "a"},
    ]
    assert read(tmp_path, {"conversations": sharegpt}) == expected
    both = [turn | {"role": None, "content": None} for turn in sharegpt]
    assert read(tmp_path, {"conversations": both}) == expected
    assert read(tmp_path, {"talk": sharegpt}, messages_field="talk") == expected
    assert read(tmp_path, [{"role": "developer", "content": "s"}, user, answer]) == expected
    columns = {key: [turn[key] for turn in (system, user, answer)] for key in ("role", "content")}
    assert read(tmp_path, {"messages": columns}) == expected
    llama = {"instruction": "u", "output": "a", "system": "s", "history": []}
    assert read(tmp_path, llama) == expected
    llama |= {"history": [["q", "r"]]}
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    assert read(tmp_path, llama) == [{"prompt": [system, *history, user], "answer": "a"}]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], r"'\[\]' is no list of turns"),
        ("hello", "is no JSON list of turns"),
        ("{[]: 1}", "is no JSON list of turns"),
        ({"role": ["user"], "content": ["x", "y"]}, "is no list of turns"),
        ({"role": "user", "content": "x"}, "is no list of turns"),
        (
            [{"from": "human", "value": "x"}, {"from": "observation", "value": "y"}],
            "turn 1: from='observation' is",
        ),
        (["hello"], "is no list of turns"),
        ([{"role": "user"}], r"turn 0: has \['role'\]; a turn has role and content"),
        ([{"role": "tool", "content": "x"}], "turn 0: role='tool' is not one of"),
        ([{"role": ["user"], "content": "x"}], r"turn 0: role=\['user'\] is not one of"),
        ([{"role": "user", "content": None}], "turn 0: None is neither a string nor a number"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"turn 0: holds parts of type \['image'\]"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}], "turn 0: it calls tools"),
        ([{"role": "assistant", "content": "x", "weight": 0}], "turn 0: weight=0"),
        (
            [{"role": "user", "content": "x"}],
            r"no user turn is followed by an assistant's, it has \['user'\]",
        ),
        ([{"role": "assistant", "content": "x"}], "no user turn is followed"),
    ],
)
def test_what_is_no_conversation_is_refused(turns: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"d\.jsonl: example 0, column 'messages'.*{message}") as error:
        read(tmp_path, turns)
    assert "\n" not in str(error.value)


def test_prompts_of_a_task_are_told_apart_by_all_their_turns(tmp_path: Path) -> None:
    """Splitting by hash, dropping what is tested and the overlap look at the whole conversation."""
    user, answer = {"role": "user", "content": "go on"}, {"role": "assistant", "content": "a"}
    rows = [
        {"messages": [{"role": "user", "content": f"story {i}"}, answer, user, answer]} for i in range(60)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_examples(TaskConfig(name="t", path=str(tmp_path / "d.jsonl")), seed=0)
    assert len(splits.train) + len(splits.test) == 60
    assert 0 < len(splits.test) < 20


def test_a_system_turn_that_a_template_refuses_is_one_line() -> None:
    tokenizer = char_tokenizer(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[-1].content }}"
    )
    with pytest.raises(ValueError, match=r"cannot be rendered for system and user turns.*no system"):
        encode_prompt([[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]], tokenizer)
    odd = char_tokenizer(
        "{% if messages[0].role != 'user' %}{{ raise_exception('who?') }}{% endif %}{{ messages[-1].content }}"
    )
    with pytest.raises(ValueError, match=r"cannot be rendered for a b turns \(TemplateError: who\?\)"):
        encode_prompt([[{"role": "a\nb", "content": "u"}]], odd)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{% if m.role != 'system' %}{{ m.content }}<|end|>{% endif %}", True),
        ("{% if m.role != 'system' or loop.first %}{{ m.content }}<|end|>{% endif %}", False),
        ("{{ m.content | upper if m.role == 'system' else m.content }}<|end|>", False),
    ],
    ids=["left out", "written", "in capitals"],
)
def test_a_system_turn_that_a_template_leaves_out_is_said_once(
    written: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _say_left_out.cache_clear()
    tokenizer = bpe_tokenizer(f"{{% for m in messages %}}{written}{{% endfor %}}")
    told = [[{"role": "system", "content": text}, *TURNS[:1]] for text in (" ", "be brief", "be kind")]
    for prompts in ([TURNS, TURNS[:1]], told[:1]):  # of which the system says nothing
        encode_prompt(prompts, tokenizer)
    assert "the system says" not in caplog.text
    for _ in range(2):
        encode_prompt([TURNS, *told], tokenizer)
    assert caplog.text.count("it leaves out what the system says, in training and in answers") == said
