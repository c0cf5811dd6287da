"""Conversations as people store them, as turns and a last answer.

Two styles are read: OpenAI's ``[{"role", "content"}, ...]``, whose content is a text or a list of text parts, and ShareGPT's
``[{"from", "value"}, ...]``. A conversation in a cell of a CSV file is such a list as JSON, or as pandas writes it. A parquet
file may hold it by columns, ``{"role": [...], "content": [...]}``, as earlier releases of ``datasets`` wrote it. Turns before the
first question, other than the system's, and after the last answer teach nothing and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache as once
from typing import Any

from trace_dist.data.examples import Example, Prompt, Turn
from trace_dist.data.values import listed, text
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

STYLES = (("role", "content"), ("from", "value"))
"""Keys of a turn: who speaks, and what."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def is_turns(value: Any) -> bool:
    """Whether a value is a list of turns rather than anything else."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def conversation(value: Any, where: str, system: str = "") -> Example:
    """A conversation as an example.

    Args:
        value: list of turns, or a cell that holds it (``values.listed``).
        where: begins an error.
        system: what the system says, where it stands beside a conversation that does not begin with it.

    Raises:
        ValueError: it is no conversation, a turn is none or calls tools, or nothing is answered.
    """
    turns = turns_from(value, where)
    if system.strip() and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    asked = _answered_part(turns, where)
    return {"prompt": simplest(asked[:-1]), "answer": asked[-1]["content"]}


def simplest(turns: list[Turn]) -> Prompt:
    """A single user turn as plain text."""
    return turns[0]["content"] if [turn["role"] for turn in turns] == ["user"] else turns


def turns_from(value: Any, where: str) -> list[Turn]:
    """The turns of a conversation in either style.

    Raises:
        ValueError: as ``conversation``.
    """
    if isinstance(value, str):
        try:
            value = listed(value)
        except ValueError:
            raise ValueError(f"{where}: {value[:80]!r} is no JSON list of turns; write one") from None
    value = _by_turns(value)
    if not is_turns(value):
        raise ValueError(
            f'{where}: {str(value)[:80]!r} is no list of turns; write [{{"role": ..., "content": ...}}, ...]'
        )
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(value)]


def _by_turns(value: Any) -> Any:
    """Turns that are stored by columns as a list of turns; anything else as it is."""
    columns = value.values() if isinstance(value, Mapping) else ()
    if not columns or not all(isinstance(column, list) for column in columns):
        return value
    if len({len(column) for column in columns}) > 1:
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]


def _turn(raw: Mapping[str, Any], where: str) -> Turn:
    # A file that holds both styles has the keys of the other one in every turn, without values.
    style = next((keys for keys in STYLES if raw.get(keys[0]) is not None and keys[1] in raw), None)
    if style is None:
        raise ValueError(f"{where}: has {sorted(raw)}; a turn has role and content, or from and value")
    who, said = raw[style[0]], raw[style[1]]
    if not isinstance(who, str) or who not in ROLES:
        raise ValueError(f"{where}: {style[0]}={who!r} is not one of {sorted(ROLES)}; rename or drop it")
    if raw.get("tool_calls") or raw.get("function_call"):
        raise ValueError(f"{where}: it calls tools, which are not trained; drop the conversation")
    if raw.get("weight") not in (None, 1):
        raise ValueError(f"{where}: weight={raw['weight']!r}; every answer is trained, so drop the weights")
    return {"role": ROLES[who], "content": text(_joined(said, where), where)}


def _joined(content: Any, where: str) -> Any:
    """A list of text parts as one text."""
    if not is_turns(content):
        return content
    kinds = sorted({str(part.get("type")) for part in content} - {"text"})
    if kinds:
        raise ValueError(f"{where}: holds parts of type {kinds}; only text is read, so drop the conversation")
    return "".join(text(part.get("text"), where) for part in content)


def _answered_part(turns: list[Turn], where: str) -> list[Turn]:
    roles = [turn["role"] for turn in turns]
    first = next((i for i, role in enumerate(roles) if role == "user"), len(turns))
    kept = [turn for i, turn in enumerate(turns) if i >= first or turn["role"] == "system"]
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    if not kept:
        raise ValueError(f"{where}: no user turn is followed by an assistant's, it has {roles}; drop it")
    if len(kept) < len(turns):
        _say_left_out(where.rpartition(": example")[0])
    return kept


@once
def _say_left_out(source: str) -> None:
    logger.warning(
        "%s: some conversations begin with an answer or end without one; those turns are left out", source
    )
