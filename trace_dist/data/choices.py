"""Questions with choices: the prompt lists them under letters, the answer is a letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase as LETTERS
from typing import Any

from trace_dist.data.examples import Example
from trace_dist.data.values import listed, text


def lettered(question: str, choices: Any, key: Any, where: str) -> Example:
    """A question with its choices as an example.

    Args:
        question: its text.
        choices: their texts, also as JSON, or ``{"text": [...], "label": [...]}`` as in ARC.
        key: of the right one: its label, its letter, its index from 0, or its text.
        where: begins an error.

    Raises:
        ValueError: there are fewer than two choices or more than letters, or the key fits none or two of them.
    """
    texts, labels = _choices(choices, f"{where}, column 'choices'")
    right = _index(key, texts, labels, where)
    lines = [
        question,
        *(f"{letter}. {each}" for letter, each in zip(LETTERS, texts, strict=False)),
        "Answer:",
    ]
    return {"prompt": "\n".join(lines), "answer": LETTERS[right]}


def _choices(value: Any, where: str) -> tuple[list[str], list[str]]:
    """Texts, and labels where the source has some of its own."""
    if isinstance(value, str):
        try:
            value = listed(value)
        except ValueError:
            raise ValueError(f"{where}: {value[:80]!r} is no JSON list of choices; write one") from None
    labels: Sequence[Any] = []
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value, labels = value["text"], value.get("label") or []
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        raise ValueError(
            f"{where}: {str(value)[:80]!r} is no list of 2 to {len(LETTERS)} choices; write one or drop it"
        )
    if labels and len(labels) != len(value):
        raise ValueError(f"{where}: {len(value)} texts have {len(labels)} labels; give each its own")
    return [text(each, where) for each in value], [text(each, where) for each in labels]


def _index(key: Any, texts: list[str], labels: list[str], where: str) -> int:
    """Which choice a key means."""
    said = text(key, f"{where}, its right choice").strip()
    if said in labels:
        return labels.index(said)
    meant = {int(said)} if said.isdecimal() and int(said) < len(texts) else set()
    if isinstance(key, str):
        meant |= {i for i, each in enumerate(texts) if each.strip() == said or LETTERS[i] == said.upper()}
    if len(meant) != 1:
        found = "fits several of" if meant else "is neither a letter, an index from 0 nor a text of"
        raise ValueError(f"{where}: the right choice {key!r} {found} {texts}; write its letter")
    return meant.pop()
