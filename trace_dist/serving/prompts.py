"""What people ask: a text, or a conversation as chat clients send it. What is wrong is named with its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trace_dist.data.examples import Prompt
from trace_dist.data.files import check_characters, numbered_json_lines

KEYS = ("prompt", "messages", "task")
"""Of a line: a text or a conversation, and the task where it shall not be retrieved."""


class Question(NamedTuple):
    """A prompt, and the name of its task; None retrieves it."""

    prompt: Prompt
    task: str | None


def check_prompt(prompt: Any, where: str) -> Prompt:
    """A text or a conversation.

    Args:
        prompt: any value.
        where: begins the message.

    Raises:
        ValueError: it is neither, or holds what is no text.
    """
    if isinstance(prompt, str):
        return check_characters(prompt, where)
    if not isinstance(prompt, list | tuple) or not prompt:
        raise ValueError(f"{where}: must be a text or a list of turns, not {prompt!r:.80}; write one of them")
    turns = [_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(prompt, 1)]
    if turns[-1]["role"] == "assistant":
        raise ValueError(f"{where}: ends with an assistant's turn; end with what shall be answered")
    return turns


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
        raise ValueError(f"{where}: {turn!r:.80} must be an object of `role` and `content`; write these two")
    for key in ("role", "content"):
        if not isinstance(turn[key], str):
            raise ValueError(f"{where}: {key}={turn[key]!r:.80}: must be a text; write one")
        check_characters(turn[key], f"{where}: {key}")
    # OpenAI's newer name; data are read so too.
    role = "system" if turn["role"] == "developer" else turn["role"]
    return {"role": role, "content": turn["content"]}


def read_questions(path: Path, task: str | None = None) -> list[Question]:
    """The questions of a file with one JSON object per line: ``prompt`` or ``messages``, and ``task`` where it is known.

    Args:
        path: the file.
        task: of the lines that name none.

    Raises:
        ValueError: as ``read_json_lines``; a line is no such object; or there is none.
    """
    if not path.is_file():
        raise ValueError(f"input={str(path)!r}: no such file; fix the path")
    found = [_question(value, f"{path}:{number}", task) for number, value in numbered_json_lines(path)]
    if not found:
        raise ValueError(f'{path}: holds no prompt; write one object per line, as {{"prompt": "..."}}')
    return found


def _question(value: Any, where: str, usual: str | None) -> Question:
    if not isinstance(value, Mapping):
        raise ValueError(f'{where}: a {type(value).__name__}, not an object; write {{"prompt": "..."}}')
    unknown = sorted(set(value) - set(KEYS))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r:.80}; the keys are {', '.join(KEYS)}")
    given = [key for key in ("prompt", "messages") if key in value]
    if len(given) != 1:
        raise ValueError(f"{where}: needs `prompt` or `messages`, and has {len(given)} of them; give one")
    if given == ["prompt"] and not isinstance(value["prompt"], str):
        raise ValueError(
            f"{where}: prompt={value['prompt']!r:.80}: must be a text; a conversation goes into `messages`"
        )
    if given == ["messages"] and not isinstance(value["messages"], list):
        raise ValueError(
            f"{where}: messages={value['messages']!r:.80}: must be a list of turns; a text goes into `prompt`"
        )
    task = value.get("task")
    if task is not None and not isinstance(task, str):
        raise ValueError(
            f"{where}: task={task!r:.80}: must be the name of a task; leave it out to retrieve it"
        )
    return Question(check_prompt(value[given[0]], f"{where}: {given[0]}"), usual if task is None else task)
