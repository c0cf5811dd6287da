"""Random features of few examples, without a model."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from trace_dist.continual.methods.random_features import Options, RandomFeatures


def test_a_first_task_of_one_example_leaves_numbers() -> None:
    method = RandomFeatures("random_features", SimpleNamespace(cfg=SimpleNamespace(seed=0)), Options(64))
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    method.classes = ["a"]
    method.add(x[:1], torch.tensor([0]))
    assert all(bool(each.isfinite().all()) for each in method.sums.values())
    method.classes = ["a", "b"]
    labels = (x[1:, 0] > x[0, 0]).long()
    method.add(x[1:], labels)
    assert bool((method.scores(x[1:]).argmax(1) == labels).float().mean() > 0.9)
