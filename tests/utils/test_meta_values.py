"""What is known of values on the meta device, against the same operators on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trace_dist.utils.meta_values import LARGEST, MetaValues


def written_in_place(device: str) -> Tensor:
    x = torch.empty(4, 6, dtype=torch.int64, device=device)
    x.fill_(1)
    x[1:3, ::2] = torch.arange(3, device=device)
    x.T.select(0, 1).add_(5)
    return x


def masked(device: str) -> Tensor:
    x = torch.arange(12, device=device).view(3, 4)
    return x[x % 3 == 1] + x.masked_select(x > 7)


def experts(device: str) -> Tensor:
    chosen = torch.arange(10, device=device).view(5, 2) % 4
    mask = F.one_hot(chosen, num_classes=5).permute(2, 1, 0)
    hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    return torch.cat([torch.cat(torch.where(mask[expert[0]])) for expert in hit])


def split(device: str) -> Tensor:
    counts = torch.zeros(4, dtype=torch.int64, device=device).scatter(
        0, torch.arange(1, 4, 2, device=device), 2
    )
    parts = torch.arange(4, device=device).split(counts.tolist())
    return parts[3]


def repeated(device: str) -> Tensor:
    return torch.arange(3, device=device).repeat_interleave(torch.arange(3, device=device))


@pytest.mark.parametrize("compute", [written_in_place, masked, experts, split, repeated])
def test_what_follows_from_shapes_is_known(compute: Callable[[str], Tensor]) -> None:
    with MetaValues() as known:
        found = compute("meta")
        assert found.is_meta
        values = known.of(found)
    assert values is not None
    assert torch.equal(values, compute("cpu"))


def test_a_router_of_unknown_scores_spreads_its_choices() -> None:
    with MetaValues() as known:
        scores = torch.empty(8, 4, device="meta") + torch.rand(8, 4, device="meta")
        counts = F.one_hot(scores.topk(2, dim=-1).indices, 4).sum((0, 1))
        assert counts.tolist() == [4] * 4
        along_rows = scores.topk(2, dim=0).indices
        values = known.of(along_rows)
        assert values is not None
        assert all(len(set(column)) == 2 and max(column) < 8 for column in values.T.tolist())
        assert scores.argmax(-1).tolist() == [0, 1, 2, 3] * 2


def test_what_is_not_known_is_answered_with_yes() -> None:
    with MetaValues() as known:
        noise = torch.rand(3, 4, device="meta")
        assert known.of(noise) is None
        assert bool((noise > 2).all())
        assert (noise > 2).nonzero().shape == (12, 2)
        assert noise[noise > 2].shape == (12,)
        assert noise[torch.arange(3, device="meta") > 0].shape == (2, 4)
        written = torch.zeros(3, 4, device="meta")
        written.add_(noise)
        assert known.of(written) is None
        assert known.of(torch.zeros(LARGEST + 1, device="meta")) is None


def test_random_numbers_stay_those_of_the_caller() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with MetaValues():
        F.dropout(torch.ones(5, device="meta"))
        torch.rand(5, device="meta")
    assert torch.equal(torch.rand(3), expected)
