"""Which entries may be trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from trace_dist.config.checks import AUTO, Section, check
from trace_dist.config.granularity import Granularities
from trace_dist.parts import ISOLATIONS

Density = float | Literal["auto"]
"""A share of what may be masked, or the one that wins the race (config/race.py)."""
ShareOf = Literal["elements", "tensors"]


@dataclass(frozen=True)
class Spread:
    """How a density is spread over the tensors of a model.

    Attributes:
        share_of: what it is a share of: all elements, or all tensors by count.
        floor: least density of each tensor.
        cap: greatest density of each tensor.
    """

    share_of: ShareOf = "elements"
    floor: float = 0.0
    cap: float = 1.0

    def scaled(self, factor: float) -> Spread:
        """Of that many times the density, at most all of it."""
        return replace(self, floor=min(self.floor * factor, 1.0), cap=min(self.cap * factor, 1.0))


FREE = Spread()
"""Of the elements, wherever they lie."""


@dataclass(frozen=True)
class MaskConfig(Section):
    """Which entries may be trained."""

    section: ClassVar[str] = "mask"

    density: Density = 0.05
    """Share of the maskable elements that are trained, in (0, 1]. `auto`: the smallest one of `race.densities` that learns as
    well as the best."""
    granularity: str = "element"
    """What is selected together: element, block, row (output neuron), column (input neuron), head, neuron (of an MLP its rows of
    gate and up and its column of down; elsewhere a row) or tensor; of some roles another one, as in `neuron,q=head,o=column`."""
    share_of: ShareOf = "elements"
    """What the density is a share of: elements, or, for granularity tensor, tensors by count."""
    scope: Literal["model", "tensor"] = "model"
    """Where units compete: in the whole model, or within each tensor, which all get the same density then."""
    floor: float = 0.0
    """Least density of each tensor, in [0, density]."""
    cap: float = 1.0
    """Greatest density of each tensor, in [density, 1]."""
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
        if self.density != AUTO:
            inside = 0 < self.density <= 1
            check(inside, "mask.density", self.density, "must lie in (0, 1]", "use for example 0.05")
        Granularities.parse(self.granularity)
        check(self.block >= 1, "mask.block", self.block, "must be at least 1", "use 16 to 128")
        ISOLATIONS.check(self.isolation)
        self._check_spread()

    def _check_spread(self) -> None:
        whole = self.granularity == "tensor"
        rule, cure = f"granularity {self.granularity} selects inside tensors", "set mask.granularity: tensor"
        check(whole or self.share_of == "elements", "mask.share_of", self.share_of, rule, cure)
        for name, usual in (("scope", "model"), ("floor", 0.0), ("cap", 1.0)):
            value = getattr(self, name)
            rule = "granularity tensor takes a tensor whole or not at all"
            check(not whole or value == usual, f"mask.{name}", value, rule, "leave it out")
            rule = "with mask.scope: tensor every tensor has the same density"
            same = name != "scope" and self.scope == "tensor"
            check(not same or value == usual, f"mask.{name}", value, rule, "leave it out")
        if self.density == AUTO:
            return  # looked at with each density of the race
        rule = f"must lie in [0, mask.density={self.density}]"
        check(0 <= self.floor <= self.density, "mask.floor", self.floor, rule, "lower it")
        rule = f"must lie in [mask.density={self.density}, 1]"
        check(self.density <= self.cap <= 1, "mask.cap", self.cap, rule, "raise it, or use 1")

    def at(self, density: float) -> MaskConfig:
        """The same at one density. Raises ValueError where its other values do not fit it."""
        return replace(self, density=density)

    @property
    def share(self) -> float:
        """``density`` as a number.

        Raises:
            ValueError: it is ``auto``, and no race has been held.
        """
        if self.density == AUTO:
            raise ValueError(f"mask.density={self.density!r}: no race has chosen one here; give a number")
        return self.density

    @property
    def in_lines(self) -> bool:
        """Whether all units are whole rows, columns or tensors: of gradients no more is formed than is masked."""
        return Granularities.parse(self.granularity).all <= {"row", "column", "head", "neuron", "tensor"}

    @property
    def spread(self) -> Spread:
        """How the density is spread over tensors."""
        if self.scope == "tensor":
            return Spread(self.share_of, self.share, self.share)
        return Spread(self.share_of, self.floor, self.cap)
