"""The seam between the driver and a way of learning.

[Note: a method's file] A file holds one subclass of ``Method`` under the name ``METHOD`` and, where it has options, a frozen
dataclass ``Options``, a ``Section`` whose field docstrings are their help. The driver makes one object for a run, lets it learn
the tasks in order, and after each task keeps its scores, its facts and its state, so that a run that was cut goes on from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from trace_dist.bank.delta import Delta
from trace_dist.config import RunConfig
from trace_dist.config.checks import AUTO
from trace_dist.continual.judge import Row
from trace_dist.continual.race import Race
from trace_dist.continual.setting import Setting
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.speed import masked_flops
from trace_dist.train.learner import Learner
from trace_dist.train.loop import TrainResult
from trace_dist.train.workbench import Stream


class Method(ABC):
    """One way to learn a stream of tasks, and to answer from what was learned.

    All of it is collective where ``on_ranks``. Nothing is loaded before it is needed.

    Args:
        name: its name in the configuration, which files and logs carry.
        setting: what the methods of the run share.
        options: an ``Options`` of the method's file; None where it has none.
    """

    label: ClassVar[str]
    """What the report calls it."""
    colour: ClassVar[str]
    """Its colour in the report's palette (report/theme.py)."""
    masked: ClassVar[bool]
    """Whether it trains the entries of masks alone."""
    on_ranks: ClassVar[bool]
    """Whether it runs on all ranks of a sharded model; otherwise it runs in one process."""
    continues: ClassVar[bool] = False
    """Whether a task is trained on the weights that earlier tasks left; otherwise from the base."""
    own_masks: ClassVar[bool] = False
    """Whether it makes masks of its own (``Setting.own_mask``); otherwise a masked method trains the run's."""
    reads_probe: ClassVar[bool] = False
    """Whether it reads what the probe has left, beside the run's masks."""
    trains: ClassVar[bool] = True
    """Whether it trains at all; otherwise it has no learning rate."""
    keeps_answers: ClassVar[bool] = False
    """Whether what was answered stays: each test set is answered by the base and by its task's own weights, and not again."""
    teaches: ClassVar[bool] = False
    """Whether it first asks the bank for what it trains on, instead of labels."""
    copies: ClassVar[int] = 0
    """How many tensors it holds beside each weight while it trains, of the same size and in the same memory, for forecasts."""
    race: Race | None = None
    """What chose its learning rate; the driver sets it before the first task where the rate is ``auto``."""

    def __init__(self, name: str, setting: Setting, options: Any) -> None:
        self.name, self.setting, self.options = name, setting, options

    @classmethod  # noqa: B027 - most methods can be used in any run
    def check(cls, name: str, cfg: RunConfig) -> None:
        """Raise ValueError where this run cannot use the method; before any work starts."""

    @classmethod
    def races(cls, options: Any, cfg: RunConfig) -> bool:
        """Whether its learning rate is chosen by a race."""
        own = getattr(options, "lr", None)
        return cls.trains and (cfg.train.lr if own is None else own) == AUTO

    @classmethod
    def flops(cls, cfg: RunConfig, num_parameters: int, num_tokens: float) -> float:
        """Operations of training on so many tokens (``profiling.speed``), for forecasts; here those of a mask.

        Args:
            cfg: the run.
            num_parameters: of the target, outside its embeddings.
            num_tokens: of all examples of all steps.
        """
        mask = cfg.largest.mask
        recomputes = cfg.train.activation_checkpointing
        return masked_flops(num_parameters, num_tokens, mask.share, mask.in_lines, recomputes)

    @classmethod
    def num_steps(cls, options: Any, cfg: RunConfig, steps: Sequence[int]) -> int:
        """Optimizer steps with which the last of some tasks is learned, for forecasts.

        Args:
            options: of the method.
            cfg: the run.
            steps: of each task of the stream so far, as the configuration has them.
        """
        return steps[-1] if cls.trains else 0

    @classmethod
    def num_scorings(cls, num_tasks: int) -> int:
        """How often each test set is answered in a run of so many tasks, for forecasts."""
        return 2 if cls.keeps_answers else num_tasks + 1

    @classmethod
    def memory_setup(cls, cfg: RunConfig, setup: MemorySetup) -> MemorySetup:
        """The training whose memory is the method's, for forecasts.

        Args:
            cfg: the run.
            setup: training of one of the run's masks, on the ranks that the method has.
        """
        return setup

    @property
    def own_lr(self) -> float | None:
        """Peak learning rate of the method alone, from its race or its options; None where it is ``train.lr``."""
        if self.race is not None:
            return self.race.lr
        own: float | None = getattr(self.options, "lr", None)
        return own

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.setting.cfg.train.rate if self.own_lr is None else self.own_lr

    @property
    def lr_trained_with(self) -> float | None:
        """``lr`` for results; None where nothing is trained."""
        return self.lr if self.trains else None

    @property
    def lr_field(self) -> str:
        """The field that sets ``lr``, for messages."""
        return "train.lr" if self.own_lr is None else f"continual.options.{self.name}.lr"

    def trial(self, stream: Stream, part: Stream, lr: float) -> AbstractContextManager[Learner]:
        """Train as ``learn`` would, without files: the result holds inside the block, and nothing of it afterwards, bit for bit.

        A method that has none cannot race, and its learning rate must be a number.

        Args:
            stream: the task.
            part: the examples of it that are trained on, and for how many steps.
            lr: peak learning rate.

        Raises:
            NotFinite: training diverges; what it changed is put back.
        """
        raise NotImplementedError

    @abstractmethod
    def learn(self, stream: Stream) -> TrainResult:
        """Add one task to what is known. A method that leaves the shared model changed until ``close`` says so."""

    @abstractmethod
    def score(self) -> Row:
        """Scores of what is known; before the first task, those of the base."""

    def facts(self) -> dict[str, Any]:
        """Numbers for the result beside scores and losses, of the tasks that were learned so far; JSON-ready."""
        return {}

    @abstractmethod
    def state(self, folder: Path) -> None:
        """Write all that ``learn`` and ``score`` need of the tasks so far into an empty folder; rank 0 writes."""

    @abstractmethod
    def load_state(self, folder: Path) -> None:
        """Become what ``state`` wrote; called before anything was learned, on any number of ranks."""

    def made_of(self) -> dict[str, Any]:
        """What its result depends on beside the model, the examples and its options; JSON-ready. A run that was cut goes on only
        where it is the same. Collective."""
        return {}

    def product(self) -> Delta | None:
        """What is to be had of it when all tasks are learned, as a delta against the base; None where that is a bank, or nothing.

        Collective; called before ``close``.
        """
        return None

    def close(self) -> None:  # noqa: B027 - most methods leave the shared model as it was
        """Put the shared model back; called when all tasks are learned."""
