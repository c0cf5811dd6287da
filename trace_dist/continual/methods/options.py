"""Options that several methods have, and batches with replay."""

from __future__ import annotations

from dataclasses import dataclass

from trace_dist.config.checks import Rate, Section, check
from trace_dist.continual.setting import Setting
from trace_dist.data.batches import Batches
from trace_dist.train.workbench import Stream


@dataclass(frozen=True)
class Rated(Section):
    """Of a method that trains."""

    lr: Rate | None = None
    """Peak learning rate, or `auto`; as `train.lr` when not set."""

    def check(self) -> None:
        self.rates("lr")


@dataclass(frozen=True)
class Replayed(Rated):
    """Of a method that trains one set of weights, task after task."""

    replay: float = 0.0
    """Share of each batch that is drawn from earlier tasks and the general tasks, in [0, 1)."""
    replay_memory: float = 0.01
    """Share of the training examples of each of those tasks that is kept for replay, in (0, 1]."""

    def check(self) -> None:
        share, kept = self.replay, self.replay_memory
        rule, cure = "must lie in [0, 1)", "use for example 0.1"
        check(0 <= share < 1, f"{self.where}.replay", share, rule, cure)
        rule, cure = "must lie in (0, 1]", "use for example 0.01"
        check(0 < kept <= 1, f"{self.where}.replay_memory", kept, rule, cure)
        super().check()


@dataclass(frozen=True)
class LowRank(Rated):
    """Of a method that trains adapters."""

    rank: int | None = None
    """Rank of the adapters; when not set, the one that trains as many parameters as a task's mask."""

    def check(self) -> None:
        super().check()
        self.at_least(1, "rank")


def replaying(setting: Setting, stream: Stream, options: Replayed) -> Batches:
    """Batches of a task, or of a part of it, with examples of the general tasks and the tasks before it among them."""
    bench = setting.bench
    replayed, size = [*bench.general, *bench.before(stream)], setting.cfg.train.batch_size
    return bench.batches([stream], size, replayed, options.replay, options.replay_memory)
