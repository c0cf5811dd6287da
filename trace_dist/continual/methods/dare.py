"""``dare``: DARE of the deltas, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trace_dist.bank.composition import dare
from trace_dist.continual.methods.composed import Composed


@dataclass(frozen=True)
class Options(dare.Options):
    """Of ``dare``."""

    section: ClassVar[str] = "continual.options.dare"


class Dare(Composed):
    """DARE."""

    label = "DARE"
    kind = "dare"


METHOD = Dare
