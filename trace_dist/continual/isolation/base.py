"""The seam between a task's mask and training, and the tasks before it.

[Note: an isolation's file] A file holds one subclass of ``Isolation`` under the name ``ISOLATION`` and, where it has options, a
frozen dataclass ``Options``. It is asked twice: which units a task may not have, before its mask is made; and by how much the
steps of its entries are scaled, before it is trained. Earlier tasks are given lazily: one that does not look reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from trace_dist.bank.delta import Delta
from trace_dist.config import MaskConfig
from trace_dist.masks.mask import Mask
from trace_dist.masks.select import Units
from trace_dist.masks.units import UnitLayout
from trace_dist.parts import ISOLATIONS


@dataclass(frozen=True)
class Change:
    """How far a task moved its entries.

    Attributes:
        task: its name.
        mask: its entries.
        values: parameter -> [entries] fp32, what was added or taken away, without its sign.
    """

    task: str
    mask: Mask
    values: Mapping[str, Tensor]

    @classmethod
    def between(cls, before: Delta, after: Delta) -> Change:
        """From what the entries of one mask held before and after the training."""
        values = {
            name: (after.values[name].double() - old.double()).abs().float()
            for name, old in before.values.items()
        }
        return cls(after.task, after.mask, values)


class Isolation:
    """How a task's mask and step sizes are kept off earlier tasks; this one keeps off nothing.

    Args:
        options: an ``Options`` of the isolation's file; None where it has none.
    """

    label: ClassVar[str]
    """What logs and the report call it."""
    reads_changes: ClassVar[bool] = False
    """Whether ``scale`` looks at the changes of earlier tasks, which a method without a bank then keeps."""

    disjoint: ClassVar[bool] = False
    """Whether no two tasks of a stream share an entry."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def check(self, mask: MaskConfig, num_tasks: int) -> None:
        """Raise ValueError where a stream of so many tasks cannot be isolated; before any work starts."""

    def refused(self, layouts: Mapping[str, UnitLayout], earlier: Iterable[Mask]) -> Units:
        """Units that a new task may not have. Iterating over ``earlier`` is collective.

        Args:
            layouts: every maskable parameter of the target.
            earlier: the masks of the tasks before it, of this run and of its bank; of any granularity.
        """
        return {}

    def scale(self, mask: Mask, changes: Iterable[Change]) -> dict[str, Tensor] | None:
        """Factors in [0, 1] on the learning rate. Iterating over ``changes`` is collective.

        Args:
            mask: of the task.
            changes: of the tasks before it.

        Returns:
            Parameter -> [entries of the mask] fp32, equal on every rank; 1 where one is left out, or None for all.
        """
        return None


def load_isolation(cfg: MaskConfig) -> Isolation:
    """The isolation of a configuration, with its options.

    Raises:
        ValueError: there is no such isolation or option, or the module of that path holds none.
    """
    kind = ISOLATIONS.subclass(cfg.isolation, "ISOLATION", Isolation)
    return kind(ISOLATIONS.options(cfg.isolation, cfg.isolation_options))
