"""An example: a prompt, the answer that is trained, and the references that count as right.

A prompt is a text (one user turn), or the turns of a conversation up to the answer: ``{"role", "content"}`` with the roles
system, user and assistant. The answers of a conversation's earlier turns are trained too; what is generated and scored is the
last one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets

Turn = dict[str, str]
"""``{"role", "content"}``."""
Prompt = str | list[Turn]
"""One user turn as plain text, or the turns before an answer."""
Example = dict[str, Any]
"""``{"prompt", "answer"}``, and ``references`` (a list that begins with the answer) where there are several."""


def turns_of(prompt: Prompt) -> list[Turn]:
    """A prompt as turns."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def text_of(prompt: Prompt) -> str:
    """All that a prompt says, without roles."""
    return "\n".join(turn["content"] for turn in turns_of(prompt))


def question_of(prompt: Prompt) -> str:
    """The last turn before the answer."""
    return turns_of(prompt)[-1]["content"]


def references_of(example: Mapping[str, Any]) -> list[str]:
    """The answers that count as right, the trained one first."""
    return example.get("references") or [example["answer"]]


def prompt_key(prompt: Prompt) -> str:
    """Equal for equal prompts; of a plain prompt, its text."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def different(prompts: Iterable[Prompt], most: int) -> list[Prompt]:
    """The first prompts that differ from those before them, ``most`` at most."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        found.setdefault(prompt_key(prompt), prompt)
        if len(found) == most:
            break
    return list(found.values())


def as_dataset(examples: Sequence[Example]) -> datasets.Dataset:
    """Examples as rows: all prompts texts or all of them turns, and references in all rows or in none."""
    plain = all(isinstance(example["prompt"], str) for example in examples)
    several = any("references" in example for example in examples)
    rows = []
    for example in examples:
        prompt = example["prompt"] if plain else turns_of(example["prompt"])
        row = {"prompt": prompt, "answer": example["answer"]}
        rows.append(row | {"references": references_of(example)} if several else row)
    return datasets.Dataset.from_list(rows)
