"""A task's values in a model's weights and out again, by exchanging both: two swaps restore every bit.

[Note: swap] Where a delta's entries lie in a model is the same each time. A `Swap` finds it out once and keeps it beside
the values, in host memory: 4 bytes for each masked unit (8 where a parameter holds 2^31 units), little for rows, twice a bf16
value for single elements. On a CPU a swap is then one pass over the values and the cache lines of their entries
(`trace_kernels.DeltaSwapBatch`), and what is kept are the task's values or, while the model holds those, its own. To an
accelerator everything goes in one copy, and a few launches swap all parameters; the model's own values stay there until they are
put back.

[Note: own values] A model on a CPU that is the same whenever a task comes, such as a server's, need not be asked for what is
overwritten: `keep_own` remembers its own values at the task's entries, and then each way only writes. That is half of the bytes,
for the same again in host memory.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from trace_kernels.delta_swap import DeltaSwapBatch
from trace_kernels.runs import Runs

from trace_dist.masks.mask import Mask
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.masked_linear import Part
from trace_dist.sharding.support import Support, value_supports
from trace_dist.utils.devices import sent

CPU = torch.device("cpu")
ALIGNED = 16
"""Bytes at which each tensor of a parcel begins: a load at full width."""


class Swap:
    """Values of a task, ready to be put into a model, as often as one likes. See [Note: swap].

    Args:
        model: the model.
        mask: the entries.
        values: parameter -> [entries] in the dtype of the model's parameter; they are copied.
        task: the task's name.

    Raises:
        ValueError: the mask or the values are of another model or dtype, or a parameter of the model was replaced.
    """

    def __init__(self, model: ShardedModel, mask: Mask, values: Mapping[str, Tensor], task: str) -> None:
        model.check_current()
        self.task = task
        self._model, self._inside = model, False
        self._supports: list[Support] = []
        self._values: list[Tensor] = []
        for support in value_supports(model, mask):
            whole = values[support.name]
            check_dtype(task, whole.dtype, model.like(support.name).dtype)
            mine = whole[support.offset : support.offset + support.runs.num_entries]
            self._supports.append(replace(support, part=Part(), starts=None))  # those are for gradients
            self._values.append(mine.to(CPU, copy=True))
        if model.world == 1 and model.places(self._supports) is not None:
            # An accelerator gets indices, like values, when they are needed.
            self._supports = [replace(each, runs=each.runs.to(CPU)) for each in self._supports]
        self._parcel: Parcel | None = None
        if model.device.type != "cpu":
            units = [s.runs.units for s in self._supports if s.runs.units.device == CPU]
            self._parcel = Parcel([*self._values, *units])
            self._values = self._parcel.tensors[: len(self._values)]
            if units:
                pairs = zip(self._supports, self._parcel.tensors[len(self._values) :], strict=True)
                self._supports = [replace(s, runs=s.runs.with_units(packed)) for s, packed in pairs]
        self._batch: DeltaSwapBatch | None = None
        self._places: list[int] | None = None
        self._own: list[Tensor] | None = None
        self._writes: dict[bool, DeltaSwapBatch] = {}  # by whether the values are the task's

    @property
    def nbytes(self) -> int:
        """Bytes of the values, the model's own where they are kept, and where all of them lie."""
        indices = sum(part.nbytes for support in self._supports for part in support.indices())
        return indices + sum(values.nbytes for values in (*self._values, *(self._own or ())))

    @property
    def keeps_own(self) -> bool:
        """Whether the model's own values are kept, too."""
        return self._own is not None

    def keep_own(self) -> None:
        """Keep the model's own values, which must be those of now whenever the task is applied ([Note: own values]).

        Does nothing for a model on an accelerator, or with NF4 weights.
        """
        if self._model.device.type == "cpu" and self._model.places(self._supports) is not None:
            places = [self._model.storage(support) for support in self._supports]
            self._own = [_taken(weight, runs) for weight, runs in places]

    def forget_own(self) -> None:
        """Let go of the model's own values."""
        self._own = None
        self._writes.clear()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model holds the task's values; afterwards its own, bit for bit. Collective.

        Not to be entered again inside its own block, in which the model stays on its device.
        """
        if self._inside:
            raise AssertionError(f"task {self.task!r}: the model holds its values already")
        own = self._own
        if own is None:
            others = self._exchange(self._values)
        else:
            self._write(self._values)
        self._inside = True
        try:
            yield
        finally:
            if own is None:
                self._exchange(others)
            else:
                self._write(own)
            self._inside = False
            self._model.release()

    def _write(self, values: list[Tensor]) -> None:
        """Put values into the model, whose own are kept."""
        self._find_places()
        ours = values is self._values
        if ours not in self._writes:
            self._writes[ours] = DeltaSwapBatch(self._operands(values))
        self._writes[ours].write()
        self._model.refresh(self._supports)

    def _find_places(self) -> None:
        """Forget what was made for places where the weights no longer are."""
        places = self._model.places(self._supports)
        if places is None or places != self._places:
            self._batch, self._places = None, places
            self._writes.clear()

    def _exchange(self, values: list[Tensor]) -> list[Tensor]:
        """Put values into the model; those that were there before."""
        self._find_places()
        batch = self._batch
        if batch is None:
            operands = self._operands(values)
            batch, values = DeltaSwapBatch(operands), [each[2] for each in operands]
            self._batch = batch
        batch.run()
        if self._inside and not all(map(operator.is_, values, self._values)):
            self._batch = None  # what it holds on an accelerator goes
        self._model.refresh(self._supports)
        return values

    def _operands(self, values: list[Tensor]) -> list[tuple[Tensor, Runs, Tensor]]:
        """Weight, entries and values of each parameter, where the weight is."""
        places = [self._model.storage(support) for support in self._supports]
        # Another overlay of a 4-bit weight has other places.
        ours = all(runs is s.runs for (_, runs), s in zip(places, self._supports, strict=True))
        if self._parcel is not None and ours and all(map(operator.is_, values, self._values)):
            there = self._parcel.on(self._model.device)
            values, units = there[: len(values)], there[len(values) :]
            if units:
                places = [(w, runs.with_units(u)) for (w, runs), u in zip(places, units, strict=True)]
        return [
            (weight, runs.to(weight.device), sent(mine, weight.device))
            for (weight, runs), mine in zip(places, values, strict=True)
        ]


def _taken(weight: Tensor, runs: Runs) -> Tensor:
    """A copy of a weight's entries, bit for bit: [entries]."""
    return torch.cat([weight[:0], *(piece.gather(weight) for piece in runs.pieces())])


class Parcel:
    """Tensors that cross to an accelerator in one copy.

    Args:
        tensors: contiguous, of any dtypes; they are copied to the CPU.

    Attributes:
        tensors: the same, on the CPU.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._like = [(tensor.dtype, tensor.nbytes) for tensor in tensors]
        size = sum(-(-num_bytes // ALIGNED) * ALIGNED for _, num_bytes in self._like)
        self._bytes = torch.empty(size, dtype=torch.uint8)
        self.tensors = self._cut(self._bytes)
        for mine, tensor in zip(self.tensors, tensors, strict=True):
            mine.copy_(tensor)

    def on(self, device: torch.device) -> list[Tensor]:
        """The same on another device."""
        return self._cut(sent(self._bytes, device))

    def _cut(self, flat: Tensor) -> list[Tensor]:
        begin, found = 0, []
        for dtype, num_bytes in self._like:
            found.append(flat[begin : begin + num_bytes].view(dtype))
            begin += -(-num_bytes // ALIGNED) * ALIGNED
        return found


def check_dtype(task: str, found: torch.dtype, dtype: torch.dtype) -> None:
    """Raise ValueError unless a task's values have the dtype that the model has."""
    if found != dtype:
        raise ValueError(
            f"delta {task!r}: holds {found}, the model {dtype}; load the model in the same dtype"
        )
