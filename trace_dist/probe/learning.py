"""Whether a probe has learned its task: a proxy that cannot learn it shows nothing.

Measured on examples that the probe does not train on: nats per answer token before and after it, and by chance. Chance is the
loss of a guess that knows how answers look and never reads a prompt: at each position of the answer the tokens that the training
answers have there, as often as they have them, and one further token that was never seen (add-one smoothing).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import datasets

from trace_dist.data.batches import Step
from trace_dist.data.encoding import IGNORE

POSITIONS = 64
"""Positions of an answer that have counts of their own; later ones share the last."""

SAMPLED = 10_000
"""Training answers that are counted at most, evenly spaced."""


@dataclass(frozen=True)
class HeldOut:
    """What a probe is judged by.

    Attributes:
        step: the examples, as one global batch.
        examples: how many they are.
        chance: nats per answer token of a guess that reads no prompt.
    """

    step: Step
    examples: int
    chance: float


@dataclass(frozen=True)
class Learning:
    """How a probe has done.

    Attributes:
        before, after: nats per answer token of held-out examples.
        chance: of a guess that reads no prompt.
        examples: how many there were.
    """

    before: float
    after: float
    chance: float
    examples: int

    def is_learned(self, margin: float) -> bool:
        """Whether the loss lies a share of chance's below it."""
        return self.after <= (1 - margin) * self.chance

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Learning:
        """What ``to_json`` gave."""
        before, after, chance = (float(value[name]) for name in ("before", "after", "chance"))
        return cls(before, after, chance, int(value["examples"]))

    def __str__(self) -> str:
        return f"loss {self.before:.2f} -> {self.after:.2f} on {self.examples} held-out examples, chance {self.chance:.2f}"


def chance_loss(trained: datasets.Dataset, heldout: datasets.Dataset) -> float:
    """Nats per answer token of held-out examples, guessed from the answers of the trained ones by position alone.

    Args:
        trained, heldout: encoded examples (data/encoding.py).
    """
    if len(trained) > SAMPLED:
        trained = trained.select(range(0, len(trained), -(-len(trained) // SAMPLED)))
    counts: dict[int, Counter[int]] = {}
    for position, token in _answers(trained):
        counts.setdefault(position, Counter())[token] += 1
    # Answers longer than any that was trained on: as its last tokens.
    last = max(counts)
    totals = {position: sum(of.values()) + len(of) + 1 for position, of in counts.items()}
    nats = [
        -math.log((counts[position][token] + 1) / totals[position])
        for position, token in ((min(place, last), token) for place, token in _answers(heldout))
    ]
    return sum(nats) / len(nats)


def _answers(examples: datasets.Dataset) -> Iterator[tuple[int, int]]:
    """(position in the answer, token) of every answer token."""
    for labels in examples["labels"]:
        answer = (label for label in labels if label != IGNORE)
        yield from ((min(place, POSITIONS - 1), token) for place, token in enumerate(answer))
