"""The seam between a new task's training and what the bank has learned before.

[Note: a start's file] A file holds one subclass of ``Start`` under the name ``START`` and, where it has options, a frozen
dataclass ``Options``. It is asked once for each task, when its signature is known and before its mask is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import Delta
from trace_dist.bank.recipe import Recipe
from trace_dist.bank.signature import Signature
from trace_dist.config import BankConfig
from trace_dist.continual.setting import Setting
from trace_dist.masks.mask import Mask
from trace_dist.parts import STARTS
from trace_dist.train.workbench import Stream


@dataclass(frozen=True)
class Begun:
    """What the model holds when a task's own mask begins to be trained.

    Attributes:
        delta: on the base; None where that is the base itself.
        facts: how it came about, JSON-ready; the bank keeps them with the task.
        recipe: how ``delta`` is made of the bank's, for ``bank.keep: recipe``; None where it is made of something else.
    """

    delta: Delta | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None


class Start:
    """Where a task's training begins; this one begins at the base.

    Args:
        options: an ``Options`` of the start's file; None where it has none.
    """

    label: ClassVar[str]
    """What logs and the report call it."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def begin(
        self,
        setting: Setting,
        bank: DeltaBank,
        stream: Stream,
        mask: Mask,
        signature: Signature,
        name: str,
        lr: float | None = None,
    ) -> Begun:
        """What the model shall hold. Collective.

        Args:
            setting: the run; its model holds the base, before and after.
            bank: with the tasks before this one.
            stream: the task.
            mask: its own, which is trained afterwards, without what the start changes.
            signature: of its prompts, under the base.
            name: of the method, for its files and logs.
            lr: peak rate with which the mask is trained afterwards; ``train.lr`` when None.
        """
        return Begun()


def load_start(cfg: BankConfig) -> Start:
    """The start of a configuration, with its options.

    Raises:
        ValueError: there is no such start or option, or the module of that path holds none.
    """
    kind = STARTS.subclass(cfg.composition, "START", Start)
    return kind(STARTS.options(cfg.composition, cfg.composition_options))
