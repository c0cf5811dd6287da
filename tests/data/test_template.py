"""What stands before an answer and what ends it, for chat templates of many kinds; and templates that fail."""

from __future__ import annotations

from typing import Any

import pytest
from data.templates import KINDS, bpe_tokenizer

from trace_dist.data import encode_pairs, encode_prompt, stop_ids
from trace_dist.data.template import without_thinking

ANSWERS = ["four", "4\n 5 ", "", "<think>because</think>42", "a <think> b"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_prompt_is_all_that_stands_before_an_answer(kind: str) -> None:
    template, before, after = KINDS[kind]
    tokenizer = bpe_tokenizer(template)
    lead = {"space_before_answer": " ", "newline_before_answer": "\n"}.get(kind, "")
    assert tokenizer.decode(encode_prompt(["hi"], tokenizer)[0]) == before
    for answer in ANSWERS:
        (pair,) = encode_pairs(["hi"], [answer], tokenizer)
        assert [pair.prompt] == encode_prompt(["hi"], tokenizer)
        said = tokenizer.decode(pair.answer)
        assert said in (f"{lead}{answer}{after}", f"{answer}{after.strip()}")
        assert pair.answer[-1] == stop_ids(tokenizer)[0]
        assert not set(pair.answer[:-1]) & set(stop_ids(tokenizer))


def test_an_answer_that_holds_the_end_token_ends_there() -> None:
    tokenizer = bpe_tokenizer(KINDS["no_thinking"].template)
    (pair,) = encode_pairs(["hi"], ["four<|end|>"], tokenizer)
    assert tokenizer.decode(pair.answer) == "four<|end|>"


def test_the_default_of_several_templates_is_used() -> None:
    one, several = bpe_tokenizer(KINDS["hybrid"].template), bpe_tokenizer(None)
    several.chat_template = {
        "tool_use": "{{ raise_exception('tools') }}",
        "default": KINDS["hybrid"].template,
    }
    assert encode_pairs(["hi"], ["four"], several) == encode_pairs(["hi"], ["four"], one)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>a</think>b", "b"),
        (" <think>\n</think>\n\nb ", "\n\nb "),
        ("[THINK]a[/THINK]b", "b"),
        ("<|START_THINKING|>a<|END_THINKING|>b", "b"),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "b"),
        ("◁think▷a◁/think▷b", "b"),
        ("<think>a</think>", "<think>a</think>"),
        ("<think>a", "<think>a"),
        ("b <think>a</think>", "b <think>a</think>"),
        ("<b>a</b>c", "<b>a</b>c"),
    ],
)
def test_a_thinking_block_at_the_beginning_is_left_out(text: str, rest: str) -> None:
    assert without_thinking(text) == rest


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('this model needs a system message') }}",
            "TemplateError: this model needs a sys",
        ),
        ("{% for m in messages %}{{ m.content }", "line 1: TemplateSyntaxError"),
        ("a\n{{ messages[0].content\n}", "line 3: TemplateSyntaxError"),
        ("{{ tools.first.name }}", "UndefinedError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ({"tool_use": "x"}, "ValueError: This model has multiple chat templates"),
        ("{% for m in messages %}{{ m['content'][0].text }}{% endfor %}", "whatever the user says"),
        (
            "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('ask') }}{% endif %}{{ m.content }}"
            "{% endfor %}",
            "user and assistant turns.*ask",
        ),
    ],
)
def test_a_template_that_fails_is_one_line_that_names_it(template: Any, message: str) -> None:
    tokenizer = bpe_tokenizer(None)
    tokenizer.chat_template = template
    tokenizer.name_or_path = "some/model"
    with pytest.raises(
        ValueError, match=rf"chat template of the tokenizer 'some/model'.*{message}.*chat_template"
    ) as error:
        encode_pairs(["hi"], ["four"], tokenizer)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="chat template of the tokenizer"):
        encode_prompt(["hi"], tokenizer)


def test_a_block_that_the_template_begins_is_closed_after_its_words() -> None:
    """Also where the user speaks of such blocks; what the user writes opens none."""
    ending = "{{ '<|start|>assistant\n<think>\nLet me see.' }}"
    tokenizer = bpe_tokenizer(
        KINDS["opens_block"].template.split("{{ '<|start|>assistant\n<think>\n' }}")[0]
        + ending
        + "{% endif %}"
    )
    for asked in ("hi", "what is <think> for"):
        prompt = tokenizer.decode(encode_prompt([asked], tokenizer)[0])
        assert prompt.endswith("<|start|>assistant\n<think>\nLet me see.\n</think>\n\n")
    plain = bpe_tokenizer(KINDS["no_thinking"].template)
    assert tokenizer.decode(encode_prompt(["<think> a"], plain)[0]).endswith(
        "<think> a<|end|>\n<|start|>assistant\n"
    )


def test_today_is_always_the_same_day() -> None:
    """A run that goes on tomorrow trains on the tokens of today."""
    tokenizer = bpe_tokenizer("{{ strftime_now('%d %b %Y') }} " + KINDS["no_thinking"].template)
    assert tokenizer.decode(encode_prompt(["hi"], tokenizer)[0]).startswith("26 Jul 2024 <|start|>user")


def test_a_template_that_writes_an_answer_twice_is_refused() -> None:
    twice = KINDS["no_thinking"].template.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}"
    )
    with pytest.raises(ValueError, match="writes an answer twice"):
        encode_prompt(["hi"], bpe_tokenizer(twice))


def test_examples_are_written_together_and_the_one_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = bpe_tokenizer(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}"
        "<|end|>{% endfor %}"
    )
    calls, apply = [], tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **options: calls.append(1) or apply(*a, **options)
    )
    prompts = [f"number {i}" for i in range(50)]
    assert encode_prompt(prompts, tokenizer) == [encode_prompt([each], tokenizer)[0] for each in prompts]
    calls.clear()
    encode_prompt(prompts, tokenizer)
    assert len(calls) == 4
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with pytest.raises(ValueError, match=r"cannot be rendered for system and user turns \(.*no system\)"):
        encode_prompt([*prompts, turns, *prompts], tokenizer)
