"""A toy network for what transformers do not show: a layer that runs twice in one forward, a layer that a rank may skip."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.sharding import ShardedModel
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils import dist

WIDTH, STEPS = 7, 5


class Toy(nn.Module):
    """first -> shared -> shared again -> optional -> last, all [WIDTH, WIDTH] with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.shared, self.optional, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.shared(torch.tanh(self.shared(h))))
        if not skip:
            h = h + self.optional(h)
        return self.last(h)


def toy_inputs(num_ranks: int) -> list[list[Tensor]]:
    """Inputs [3, WIDTH] by step and rank."""
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(3, WIDTH, generator=generator) for _ in range(num_ranks)] for _ in range(STEPS)]


def toy_loss(out: Tensor) -> Tensor:
    return F.mse_loss(out, torch.ones_like(out))


def skips(rank: int, num_ranks: int, step: int) -> bool:
    """The last rank skips the optional layer in the second and the fourth step; in the third all ranks do."""
    return step == 2 or (rank == num_ranks - 1 and step in (1, 3))


def train_toy(granularity: str) -> dict[str, list[float]]:
    """Masked training on this job's ranks; the weights afterwards, on rank 0."""
    # Everything persistent: ranks that run different layers must not gather weights in between.
    model: ShardedModel = Zero3Model(Toy(), persistence_threshold=10**6)
    mask = Mask.random(model, 0.5, granularity, seed=3, maskable="all")
    optimizer = MaskedAdamW(model, mask, lr=1e-2, eps=1e-5)
    rank, num_ranks = dist.rank(), dist.world_size()
    for step, inputs in enumerate(toy_inputs(num_ranks)):
        model.backward(toy_loss(model(inputs[rank], skip=skips(rank, num_ranks, step))))
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.flatten().tolist() for name, value in model.full_state_dict().items()}


def train_toy_in_one_process(granularity: str, num_ranks: int) -> dict[str, Tensor]:
    """The same, with each rank's batch in turn."""
    model = shard(Toy(), "single")
    mask = Mask.random(model, 0.5, granularity, seed=3, maskable="all")
    optimizer = MaskedAdamW(model, mask, lr=1e-2, eps=1e-5)
    for step, inputs in enumerate(toy_inputs(num_ranks)):
        for rank, x in enumerate(inputs):
            model.backward(toy_loss(model(x, skip=skips(rank, num_ranks, step))) / num_ranks)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.flatten() for name, value in model.full_state_dict().items()}
