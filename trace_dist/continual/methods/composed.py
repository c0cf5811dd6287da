"""What post-hoc merges have in common: the bank's deltas become one set of weights without any training."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar

from trace_dist.bank.composition import compose
from trace_dist.continual.methods.one_set import OneSet
from trace_dist.train.loop import TrainResult
from trace_dist.train.workbench import Stream


class Composed(OneSet):
    """A composition of the deltas so far."""

    colour = "grey"
    trains = False
    kind: ClassVar[str]
    """Name of the composition (bank/composition/)."""

    def learn(self, stream: Stream) -> TrainResult:
        bank, names = self.bank, [each.task.name for each in self.setting.bench.upto(stream)]
        model = self.setting.model
        deltas = [delta for name in names if (delta := bank.delta_on(name, model)) is not None]
        options = None if self.options is None else asdict(self.options)
        self.delta = compose(deltas, model, self.name, self.kind, options)
        return TrainResult()
