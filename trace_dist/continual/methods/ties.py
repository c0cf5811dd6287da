"""``ties``: TIES-merging of the deltas, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trace_dist.bank.composition import ties
from trace_dist.continual.methods.composed import Composed


@dataclass(frozen=True)
class Options(ties.Options):
    """Of ``ties``."""

    section: ClassVar[str] = "continual.options.ties"


class Ties(Composed):
    """TIES."""

    label = "TIES"
    kind = "ties"


METHOD = Ties
