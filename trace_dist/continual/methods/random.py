"""``random``: as ``retrieved``, with random masks of the same density; what is left of a difference is what probing brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trace_dist.continual.methods import retrieved


@dataclass(frozen=True)
class Options(retrieved.Options):
    """Of ``random``: those of ``retrieved``."""

    section: ClassVar[str] = "continual.options.random"


class Random(retrieved.Retrieved):
    """A bank of deltas on random masks."""

    label = "random mask"
    colour = "grey"
    masks = "random"


METHOD = Random
