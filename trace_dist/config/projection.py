"""Projecting masks onto the target."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trace_dist.config.checks import Section
from trace_dist.parts import PLACEMENTS


@dataclass(frozen=True)
class ProjectionConfig(Section):
    """Small-to-large: the proxy's budgets on the target, and how places inside a tensor are chosen."""

    section: ClassVar[str] = "projection"

    placement: str = "narrow"
    """magnitude, random, refine (the largest gradients of one sharded Fisher pass on the target, at the base), narrow (pool,
    masked steps, keep the best), target (budgets too from such a pass; no proxy is read), narrow_target (as narrow, from a pool
    of the whole target; no proxy is read), identity (of a proxy cut out of the target: its entries are the target's own), align
    (of a sibling: entries of channels, heads and neurons with alike activations), or the path of a module of your own.
    Whole tensors (mask.granularity tensor) need no places: but for target, it is not used then."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the placement; of narrow: pool (magnitude, fisher or both), pool_density (0.1), steps (40) and lr (1e-3) of the
    masked steps on the pool; of identity: between (magnitude, fisher or random), by which entries of layers that the proxy
    lacks are told apart; of align: batches (4) on which activations are compared."""

    def check(self) -> None:
        PLACEMENTS.check(self.placement)
