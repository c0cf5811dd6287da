"""``joint``: full fine-tuning on the tasks so far together, from the base. What no method that sees them one by one is expected
to beat: a bound.

After each task it begins anew, with as many steps as the tasks so far have together. Each of them is drawn as often as it has
steps, so it sees as many of its examples as with a training of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from trace_dist.config import RunConfig
from trace_dist.continual.methods.full import Full
from trace_dist.continual.methods.options import Rated
from trace_dist.data.batches import Batches
from trace_dist.train.workbench import Stream


@dataclass(frozen=True)
class Options(Rated):
    """Of ``joint``."""

    section: ClassVar[str] = "continual.options.joint"


class Joint(Full):
    """All tasks at once."""

    label = "joint training (bound)"
    colour = "amber"
    continues = False

    @classmethod
    def num_steps(cls, options: Any, cfg: RunConfig, steps: Sequence[int]) -> int:
        return sum(steps)

    def steps(self, stream: Stream) -> int:
        return sum(each.steps for each in self.setting.bench.upto(stream))

    def validated(self, stream: Stream) -> list[Stream]:
        return self.setting.bench.upto(stream)

    def batches(self, stream: Stream) -> Batches:
        bench, others = self.setting.bench, self.setting.bench.before(stream)
        weights = [float(each.steps) for each in others]
        size, share = self.setting.cfg.train.batch_size, sum(weights) / self.steps(stream)
        return bench.batches([stream], size, others, share, weights=weights)


METHOD = Joint
