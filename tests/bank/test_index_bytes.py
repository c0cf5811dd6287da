"""Reading and writing values takes a rank the indices of its own entries, not of all ranks'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from trace_kernels.runs import Runs

from trace_dist import Mask
from trace_dist.bank import swap
from trace_dist.bank.delta import Snapshot, extract_delta
from trace_dist.masks import UnitLayout
from trace_dist.sharding.support import Support, build_supports
from trace_dist.sharding.views import PartitionView, flat_views
from trace_dist.train.combination import CombinationLearner
from trace_dist.utils import dist

WORLD, SHAPE = 8, (40, 25)
UNITS = torch.arange(3, 1000, 7, dtype=torch.int32)
MASK = Mask({"w": UNITS}, {"w": UnitLayout(SHAPE, 1)}, "element")
WHOLE = torch.randn(1000, generator=torch.Generator().manual_seed(0))


class OneRank:
    """One of eight ranks, which keeps what it was asked for the values of."""

    device, dtype, world, quantize = torch.device("cpu"), WHOLE.dtype, WORLD, "none"

    def __init__(self, rank: int) -> None:
        self.rank, self.asked = rank, list[Support]()
        view = self.views("w")[rank]
        self.values = WHOLE[view.start : view.stop].clone()

    def names(self) -> list[str]:
        return ["w"]

    def shape(self, _: str) -> tuple[int, ...]:
        return SHAPE

    def views(self, _: str) -> list[PartitionView]:
        return flat_views(1000, 125, WORLD)

    def like(self, _: str) -> Tensor:
        return self.values[:0]

    def indices_may_leave(self, _: str) -> bool:
        return True

    def storage(self, support: Support) -> tuple[Tensor, Runs]:
        self.asked.append(support)
        return self.values, support.runs

    def check_current(self) -> None: ...

    def refresh(self, _: object) -> None: ...

    def release(self) -> None: ...

    def detach(self) -> None: ...

    @property
    def index_bytes(self) -> int:
        """Of the supports that it was asked with, whether shared out or not."""
        gaps = [support.gaps.words for support in self.asked if support.gaps is not None]
        return sum(part.nbytes for part in (*gaps, *(support.runs.units for support in self.asked)))


def ranks() -> Iterator[Any]:
    for rank in range(WORLD):
        model = OneRank(rank)
        yield model
        # one byte for each of all ranks' gaps would come on top
        assert 0 < model.index_bytes == 4 * len(model.asked) * model.asked[0].runs.num_entries


def test_a_snapshot() -> None:
    for model in ranks():
        before = model.values.clone()
        snapshot = Snapshot(model, MASK)
        model.values[:] = torch.where(mine(model), 7.0, model.values)
        snapshot.restore()
        assert torch.equal(model.values, before)


def test_an_extracted_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Tensor] = []

    def gather(part: Tensor, splits: list[int]) -> Tensor:
        parts.append(part)
        assert sum(splits) == len(UNITS)
        return torch.zeros(len(UNITS))

    monkeypatch.setattr(dist, "all_gather_uneven", gather)
    for model in ranks():
        extract_delta(model, MASK, "a")
    assert torch.equal(torch.cat(parts), WHOLE[UNITS.long()])


def test_a_combination_that_is_taken_back() -> None:
    for model in ranks():
        learner = CombinationLearner.__new__(CombinationLearner)
        learner.model, learner.mask, learner._supports = model, MASK, []
        view = model.views("w")[model.rank]
        learner._base = [WHOLE[view.start : view.stop][mine(model)]]
        before = model.values.clone()
        model.values[mine(model)] = 7.0
        learner.restore()
        assert torch.equal(model.values, before)


def test_whoever_keeps_them_all_has_the_same_entries() -> None:
    for model in ranks():
        (whole,), (own,) = build_supports(model, MASK), swap.value_supports(model, MASK)
        assert torch.equal(whole.runs.units, own.runs.units)
        assert (whole.splits, whole.offset) == (own.splits, own.offset)
        model.storage(own)


def mine(model: OneRank) -> Tensor:
    """Which of a rank's elements are masked."""
    view = model.views("w")[model.rank]
    return torch.isin(torch.arange(view.start, view.stop), UNITS)
