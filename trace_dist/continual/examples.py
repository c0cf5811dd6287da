"""A few of the answers that were given at evaluation, right and wrong ones of each task, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trace_dist.data.examples import Prompt, references_of, turns_of

KEPT = 3
"""Right answers that are kept, and as many wrong ones."""
LONGEST = 600
"""Characters that are kept of a text, its begin and its end; a report is to be read."""
RIGHT = 0.5
"""Score from which on an answer counts as right: of a graded metric, the better half."""


@dataclass(frozen=True)
class Answered:
    """One test example, and what answered it.

    Attributes:
        task: whose example it is.
        prompt: what was asked; the turns of a conversation carry their roles.
        retrieved: name of the delta that answered, or ``base``.
        answer: what it said.
        references: what counts as right.
        score: in [0, 1].
    """

    task: str
    prompt: str
    retrieved: str
    answer: str
    references: list[str]
    score: float

    @classmethod
    def of(cls, task: str, row: Mapping[str, Any], retrieved: str, answer: str, score: float) -> Answered:
        """From a row of a task's test examples; long texts are cut."""
        references = [cut(reference) for reference in references_of(row)[:KEPT]]
        return cls(task, cut(_written(row["prompt"])), retrieved, cut(answer), references, score)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def few(scores: Mapping[int, float]) -> list[int]:
    """Of examples with their scores: the first KEPT right ones of the highest scores, and wrong ones of the lowest."""
    right = sorted((-score, i) for i, score in scores.items() if score >= RIGHT)
    wrong = sorted((score, i) for i, score in scores.items() if score < RIGHT)
    return [i for _, i in right[:KEPT]] + [i for _, i in wrong[:KEPT]]


def cut(text: str) -> str:
    """A text of at most LONGEST characters, cut in its middle."""
    if len(text) <= LONGEST:
        return text
    half = (LONGEST - 3) // 2
    return f"{text[:half]} … {text[-half:]}"


def _written(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns_of(prompt))
