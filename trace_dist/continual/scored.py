"""What the deltas of a bank have been scored on, and a few of their answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from trace_dist.continual.examples import few
from trace_dist.evaluation import Score


@dataclass
class Scored:
    """What a bank's deltas have been scored on: a delta never changes, and neither do the scores of what it answers.

    It is kept between the lives of a run: to generate the answers again would cost the more the more tasks there are, and in
    batches of other examples a score could come out differently.

    Attributes:
        examples: delta (or ``base``) -> test set -> example -> score.
        answers: delta (or ``base``) -> test set -> example -> what was said, of a few right and wrong ones (``examples.few``).
        texts: test set -> bits per byte of the base, with which running text is always read.
    """

    examples: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    answers: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)
    texts: dict[str, float] = field(default_factory=dict)

    def add(self, delta: str, test_set: str, indices: list[int], score: Score) -> None:
        """Keep the scores of some examples, and a few of the answers."""
        scores = self.of(delta, test_set)
        scores.update(zip(indices, score.per_example, strict=True))
        said = self.answers.setdefault(delta, {}).setdefault(test_set, {})
        said.update(zip(indices, score.answers, strict=False))
        self.answers[delta][test_set] = {i: said[i] for i in few({i: scores[i] for i in said})}

    def of(self, delta: str, test_set: str) -> dict[int, float]:
        """Scores by example, to be read and added to."""
        return self.examples.setdefault(delta, {}).setdefault(test_set, {})

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Scored:
        """What ``to_json`` gave, also by way of a file, where keys are text."""
        examples, answers = (
            {
                delta: {name: {int(i): each for i, each in found.items()} for name, found in sets.items()}
                for delta, sets in value.get(part, {}).items()
            }
            for part in ("examples", "answers")
        )
        return cls(examples, answers, dict(value["texts"]))
