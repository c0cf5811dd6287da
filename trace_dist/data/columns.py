"""Which columns hold an example, and how it is read from a row.

[Note: forms of an example]
A *form* is a set of columns that people use: a pair such as prompt/answer, Alpaca's instruction/input/output, a question with
choices, a conversation. Where a task's configuration names columns or templates, these are the form. Otherwise the form is the
one whose columns are all there; a form that another one contains gives way to it. A line break joins an instruction to its
input, as in LLaMA-Factory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache as once
from typing import Any

from trace_dist.config import TaskConfig
from trace_dist.data.choices import lettered
from trace_dist.data.conversation import conversation, is_turns, simplest, turns_from
from trace_dist.data.examples import Example, Prompt, turns_of
from trace_dist.data.values import optional_text, text
from trace_dist.utils.braces import columns_of, filled
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

Row = Mapping[str, Any]
PARTNERS = {
    "prompt": ("answer", "completion"),
    "question": ("answer",),
    "problem": ("solution",),
    "instruction": ("output",),
    "image": ("label",),
}
"""Known columns of a prompt, each with those that hold its answer."""
ANSWERS = tuple(dict.fromkeys(answer for answers in PARTNERS.values() for answer in answers))
CONVERSATIONS = ("messages", "conversations")
KEYS = ("answer", "answerKey")
"""Columns of the right choice."""
CONTEXTS = ("context", "passage", "document", "article", "paragraph", "options")
"""Columns without which a question may make no sense."""
WORDS_ASKED = 8
"""Words at the beginning of a running text that are its prompt."""


@dataclass(frozen=True)
class Form:
    """Where an example stands in a row ([Note: forms of an example]).

    Attributes:
        columns: that must be there.
        read: an example from a row, or None where there is nothing to learn; the text begins an error.
        optional: columns that are read where they are there.
        fields: how a task's configuration names these columns; empty where it cannot.
    """

    columns: tuple[str, ...]
    read: Callable[[Row, str], Example | None]
    optional: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "/".join(self.columns)


def find_form(task: TaskConfig, columns: Sequence[str], where: str) -> Form:
    """The form of a task's examples.

    Args:
        task: may name columns or templates.
        columns: of the source.
        where: names the source in errors.

    Raises:
        ValueError: no form or several fit, or a column that is named is not there.
    """
    _check_named(task, columns, where)
    fitting = [form for form in _forms(task, columns) if set(form.columns) <= set(columns)]
    widest = [
        form for form in fitting if not any(set(form.columns) < set(other.columns) for other in fitting)
    ]
    if len(widest) > 1:
        raise ValueError(
            f"{where}: the columns {sorted(columns)} hold several forms of an example, "
            f"{' and '.join(map(str, widest))}; choose by {task.where}.prompt_field and answer_field, "
            "or messages_field"
        )
    if not widest:
        raise ValueError(f"{where}: {_missing(task, columns)}")
    return widest[0]


def say_form(task: TaskConfig, form: Form, columns: Sequence[str]) -> None:
    """Log which columns are read and which are not, once for a task."""
    read = [*form.columns, *(column for column in form.optional if column in columns)]
    _say(task.where, tuple(read), tuple(sorted(set(columns) - set(read))))


@once
def _say(where: str, read: tuple[str, ...], unread: tuple[str, ...]) -> None:
    others = f"; not {', '.join(unread)}" if unread else ""
    logger.info("%s: reads the columns %s%s", where, ", ".join(read), others)
    missed = " and ".join(column for column in unread if column in CONTEXTS)
    if missed:
        logger.warning(
            "%s: the column %s is not read; where the question needs it, write a prompt_template",
            where,
            missed,
        )


def _check_named(task: TaskConfig, columns: Sequence[str], where: str) -> None:
    for key in ("prompt_field", "answer_field", "messages_field"):
        column = getattr(task, key)
        if column is not None and column not in columns:
            raise ValueError(
                f"{where}: example 0 has no column {column!r}, it has {sorted(columns)}; "
                f"set {task.where}.{key} to one of them"
            )
    for key in ("prompt_template", "answer_template"):
        for column in columns_of(getattr(task, key) or ""):
            if column not in columns:
                raise ValueError(
                    f"{where}: {task.where}.{key} names {{{column}}}, but the columns are {sorted(columns)}; "
                    "name one of them, or write {{ and }} for braces"
                )


def _missing(task: TaskConfig, columns: Sequence[str]) -> str:
    """What is wrong where no form fits."""
    has = f"it has {sorted(columns)}"
    prompts = [prompt for prompt in PARTNERS if prompt in columns] if task.answer_field is None else []
    named = task.prompt_field is not None or task.prompt_template is not None
    if named or prompts:
        wanted = ANSWERS if named else PARTNERS[prompts[0]]
        return (
            f"example 0 has no column {wanted[0]!r}, {has}; set {task.where}.answer_field to one of them, "
            "or write an answer_template"
        )
    tried = [f"{prompt}/{answer}" for prompt, answers in PARTNERS.items() for answer in answers]
    return (
        f"example 0 has no column {next(iter(PARTNERS))!r}, {has}; columns that were tried: "
        f"{', '.join((*tried, *CONVERSATIONS))}; set {task.where}.prompt_field and answer_field to two of them, or write "
        "a prompt_template and an answer_template"
    )


def _forms(task: TaskConfig, columns: Sequence[str]) -> Iterable[Form]:
    """All forms that the configuration allows, whether their columns are there or not."""
    if task.messages_field is not None:
        yield _conversation(task.messages_field)
        return
    named_prompt = task.prompt_field is not None or task.prompt_template is not None
    named_answer = task.answer_field is not None or task.answer_template is not None
    if not named_prompt and not named_answer:
        yield from map(_conversation, CONVERSATIONS)
    if not named_prompt and task.answer_template is None:
        yield from map(_choice, (task.answer_field,) if task.answer_field is not None else KEYS)
    pairs: list[tuple[str | None, tuple[str, ...]]] = [*PARTNERS.items()]
    for prompt, answers in [(task.prompt_field, ANSWERS)] if named_prompt else pairs:
        for answer in (task.answer_field,) if named_answer else answers:
            yield _pair(task, prompt, answer)
    if not (named_prompt or named_answer) and set(columns) == {"text"}:
        yield Form(("text",), _running_text)


def _pair(task: TaskConfig, prompt: str | None, answer: str | None) -> Form:
    """A prompt and an answer, each a column or, where it is None, a template."""
    told, taught = task.prompt_template or "", task.answer_template or ""
    alpaca = prompt == "instruction" and task.prompt_field is None

    def read(row: Row, where: str) -> Example:
        if prompt is None:
            asked: Prompt = _filled(told, row, where)
        elif alpaca:
            asked = _instruction(row, where)
        else:
            asked = _asked(row[prompt], f"{where}, column {prompt!r}")
        if answer is None:
            return {"prompt": asked, "answer": _filled(taught, row, where)}
        return {"prompt": asked} | _answers(row[answer], f"{where}, column {answer!r}")

    columns = [*columns_of(told)] if prompt is None else [prompt]
    columns += columns_of(taught) if answer is None else [answer]
    fields = (
        {} if prompt is None or answer is None or alpaca else {"prompt_field": prompt, "answer_field": answer}
    )
    return Form(tuple(dict.fromkeys(columns)), read, ("input", "system", "history") if alpaca else (), fields)


def _filled(template: str, row: Row, where: str) -> str:
    values = {column: text(row[column], f"{where}, column {column!r}") for column in columns_of(template)}
    return filled(template, values)


def _asked(value: Any, where: str) -> Prompt:
    """A prompt column: a text, or the turns before an answer."""
    return simplest(turns_from(value, where)) if is_turns(value) else text(value, where)


def _answers(value: Any, where: str) -> Example:
    """An answer column: a text, one answering turn, or several references, also as SQuAD's ``{"text": [...]}``."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value = value["text"]
    if is_turns(value):
        turns = turns_from(value, where)
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise ValueError(f"{where}: must be one assistant turn; put the others into the prompt")
        return {"answer": turns[0]["content"]}
    if not isinstance(value, list):
        return {"answer": text(value, where)}
    found = list(dict.fromkeys(text(each, where) for each in value))
    if not found:
        raise ValueError(f"{where}: the list of references is empty; give one or drop the example")
    return {"answer": found[0]} | ({"references": found} if len(found) > 1 else {})


def _instruction(row: Row, where: str) -> Prompt:
    """Alpaca's prompt, with what the system says and earlier rounds where LLaMA-Factory's columns hold them."""
    asked, more, system = (
        optional_text(row.get(column), f"{where}, column {column!r}")
        for column in ("instruction", "input", "system")
    )
    turns = [{"role": "system", "content": system}] if system.strip() else []
    for number, round_ in enumerate(row.get("history") or []):
        place = f"{where}, column 'history', round {number}"
        if not isinstance(round_, list) or len(round_) != 2:
            raise ValueError(f"{place}: {round_!r} is no pair of a question and an answer; write two texts")
        turns += [
            {"role": role, "content": text(said, place)}
            for role, said in zip(("user", "assistant"), round_, strict=True)
        ]
    return simplest([*turns, *turns_of(f"{asked}\n{more}" if more.strip() else asked)])


def _conversation(column: str) -> Form:
    def read(row: Row, where: str) -> Example:
        system = optional_text(row.get("system"), f"{where}, column 'system'")
        return conversation(row[column], f"{where}, column {column!r}", system)

    return Form((column,), read, ("system",), {"messages_field": column})


def _choice(key: str) -> Form:
    def read(row: Row, where: str) -> Example:
        return lettered(text(row["question"], f"{where}, column 'question'"), row["choices"], row[key], where)

    return Form(("question", "choices", key), read)


def _running_text(row: Row, where: str) -> Example | None:
    """The first words of a text ask for the others; the first characters where it has no spaces."""
    whole = text(row["text"], f"{where}, column 'text'").strip()
    gap = " " if " " in whole else ""
    words = whole.split(gap) if gap else list(whole)
    if len(words) < 2:
        return None
    asked = gap.join(words[: min(WORDS_ASKED, len(words) // 2)])
    return {"prompt": asked, "answer": whole[len(asked) :]}
