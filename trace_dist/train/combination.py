"""How much of each earlier task a new one begins with: a scalar per earlier delta and group of roles.

    W(a) = base + sum over deltas j and groups g of   a_jg (delta_j - base) on the weights of g
    dL / da_jg = <dL / dW, (delta_j - base) on g>

The gradient of W is formed at the deltas' entries alone, inside each rank's shard; the scalars' gradients are its inner
products, summed over ranks. After each step of Adam the scalars shrink (proximal elastic net: l1 takes a constant part of a
step and so selects, l2 a share). Selected combinations of earlier modules begin a task in PROTEUS (arXiv 2603.13235).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from trace_kernels.compact import compact_gather, compact_scatter

from trace_dist.bank.delta import Delta, check_dtype
from trace_dist.bank.recipe import GROUPS, change_of, group_of, mixed
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.support import Support, value_supports
from trace_dist.train.learner import Learner
from trace_dist.utils import dist
from trace_dist.utils.finite import check_finite


class _Change(NamedTuple):
    """What a delta changes of one parameter, on this rank.

    Attributes:
        places: [n] int64 positions among the entries of the union.
        values: [n] fp32 (fp64 for an fp64 model), tuned minus base.
        row, column: of the scalar.
    """

    places: Tensor
    values: Tensor
    row: int
    column: int


class CombinationLearner(Learner):
    """Fits the scalars; the model holds W(a). ``restore`` puts the base back. Collective.

    Args:
        model: holds the base.
        deltas: of one granularity.
        lr: of Adam; the scalars begin at 0.
        l1, l2: shrinkage, as shares of a step: of its length, and of the scalar.

    Raises:
        ValueError: a delta is of another model, dtype or granularity.
    """

    optimizer: torch.optim.Adam
    model: ShardedModel

    def __init__(
        self, model: ShardedModel, deltas: Sequence[Delta], lr: float, l1: float = 0.0, l2: float = 0.0
    ) -> None:
        self.model, self.module, self.deltas = model, model.module, list(deltas)
        self._l1, self._l2 = l1, l2
        self.mask = reduce(or_, (delta.mask for delta in deltas))
        self._supports = model.attach(self.mask)
        self._base = [compact_gather(*model.storage(support)) for support in self._supports]
        self._changes = [self._changes_of(*each) for each in zip(self._supports, self._base, strict=True)]
        self.scalars = nn.Parameter(
            torch.zeros(len(deltas), len(GROUPS), dtype=torch.float64, device=model.device)
        )
        self.optimizer = torch.optim.Adam([self.scalars], lr=lr)

    def _changes_of(self, support: Support, base: Tensor) -> list[_Change]:
        name, found = support.name, list[_Change]()
        column = GROUPS.index(group_of(name))
        first = support.offset
        entries = self.mask.elements(name)[first : first + support.runs.num_entries]
        for row, delta in enumerate(self.deltas):
            if name not in delta.mask.units:
                continue
            check_dtype(delta, name, self.model.like(name).dtype)
            theirs = delta.mask.elements(name)
            places = torch.searchsorted(entries, theirs)
            # beyond this rank's part, or before it
            mine = places < len(entries)
            mine &= entries[places.clamp(max=max(len(entries) - 1, 0))] == theirs if len(entries) else mine
            places = places[mine].to(base.device)
            values = change_of(delta.values[name][mine], base[places])
            found.append(_Change(places, values, row, column))
        return found

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss, reduction="sum")

    def step(self) -> float:
        gradient = torch.zeros_like(self.scalars, dtype=torch.float64)
        for support, changes in zip(self._supports, self._changes, strict=True):
            if support.reached:
                for places, values, row, column in changes:
                    gradient[row, column] += support.grad[places].double() @ values.double()
        self.scalars.grad = dist.sum_over_ranks(gradient)
        norm = float(self.scalars.grad.norm())
        check_finite(norm, "the gradient norm")
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        with torch.no_grad():
            least = (self.scalars.abs() - rate * self._l1).clamp_(min=0)
            self.scalars.copy_(self.scalars.sign() * least / (1 + rate * self._l2))
        self.write()
        self.model.mark_gradients_spent()
        self.model.zero_grad()
        return norm

    def discard(self) -> None:
        self.model.zero_grad()

    def ranks_not_finite(self) -> list[int]:
        return self.model.ranks_not_finite()

    @torch.no_grad()
    def set(self, scalars: Tensor) -> None:
        """Take other scalars, [deltas, groups], and write W(a). Collective."""
        self.scalars.copy_(scalars)
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Let the model hold W(a). Collective."""
        shares = self.scalars.tolist()
        for support, base, changes in zip(self._supports, self._base, self._changes, strict=True):
            mine = ((places, values, shares[row][column]) for places, values, row, column in changes)
            self._put(support, mixed(base, mine))
        self.model.refresh(self._supports)

    def restore(self) -> None:
        """Let the model hold the base again, bit for bit, and collect no gradients. Collective."""
        self.model.detach()
        for support, base in zip(value_supports(self.model, self.mask), self._base, strict=True):
            self._put(support, base)
        self.model.refresh(self._supports)
        self.model.release()

    def _put(self, support: Support, values: Tensor) -> None:
        compact_scatter(*self.model.storage(support), values)

    def tensors(self) -> Iterator[Tensor]:
        yield self.scalars

    def values(self) -> dict[str, Tensor]:
        return {"scalars": self.scalars}

    def put(self, values: dict[str, Tensor]) -> None:
        self.set(values["scalars"])

    def save(self, *_: object, **options: object) -> NoReturn:
        raise AssertionError("a fit of a few steps keeps no checkpoints")

    def load(self, folder: Path) -> NoReturn:
        raise AssertionError("a fit of a few steps keeps no checkpoints")
