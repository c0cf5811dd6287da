"""Which entries may be trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from trace_dist.config.checks import Section, check
from trace_dist.parts import ISOLATIONS

Granularity = Literal["element", "block", "row", "column", "head", "tensor"]


@dataclass(frozen=True)
class MaskConfig(Section):
    """Which entries may be trained."""

    section: ClassVar[str] = "mask"

    density: float = 0.05
    """Share of the maskable elements that are trained, in (0, 1]."""
    granularity: Granularity = "element"
    """What is selected together: element, block, row (output neuron), column (input neuron), head or tensor."""
    block: int = 32
    """Contiguous elements of one row per unit, for granularity block."""
    maskable: str = "linear"
    """`linear` (every linear layer but the output head, fused experts too), `all`, or a regular expression over names."""
    isolation: str = "shared"
    """How a task keeps off what earlier tasks trained: shared (not at all), exclusive (their entries are refused, the next best
    are taken), soft (smaller steps where they need an entry), or the path of a module of your own."""
    isolation_options: dict[str, Any] = field(default_factory=dict)
    """Options of the isolation; of soft: strength (1.0)."""

    def check(self) -> None:
        inside = 0 < self.density <= 1
        check(inside, "mask.density", self.density, "must lie in (0, 1]", "use for example 0.05")
        check(self.block >= 1, "mask.block", self.block, "must be at least 1", "use 16 to 128")
        ISOLATIONS.check(self.isolation)
