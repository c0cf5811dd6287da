"""Run on some ranks by test_placements: scores and masks of a model in its shards.

Every rank writes what it found of ``<name>.<rank>.safetensors``; the tests compare it with a plain model in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from probe.setting import NARROW, make_batches, make_config, make_model

from trace_dist.config import MaskConfig, ProjectionConfig
from trace_dist.masks.ops import layouts_for, mask_from_scores, place, random_mask
from trace_dist.models.origin import Origin
from trace_dist.projection.placements.magnitude import magnitude_scores
from trace_dist.projection.placements.narrow import narrow_scores
from trace_dist.projection.placements.refine import fisher_scores
from trace_dist.projection.project import project_task
from trace_dist.projection.site import Shown
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.build import shard
from trace_dist.utils import dist
from trace_dist.utils.files import save_tensors, write_json

GRANULARITIES = ("element", "block", "row", "column", "tensor")


def main(out: Path, backend: str) -> None:
    model = shard(make_model(), backend)
    before = model.full_state_dict()
    found: dict[str, torch.Tensor] = {}
    for granularity in GRANULARITIES:
        found |= scores_and_mask(model, granularity)
    found |= narrowed(model) | competing(model)
    by_position, matching = identity(model)
    found |= by_position
    after = model.full_state_dict()
    save_tensors(out / f"found.{dist.rank()}.safetensors", found, {"format": "trace_dist.found"})
    same = all(torch.equal(value, after[name]) for name, value in before.items())
    write_json(
        out / f"facts.{dist.rank()}.json", {"restored": same, "cut": cut_units(model), "matching": matching}
    )
    dist.barrier()
    dist.close()


def scores_and_mask(model: ShardedModel, granularity: str) -> dict[str, torch.Tensor]:
    """Fisher scores, and the mask of largest magnitudes at 20 %."""
    layouts = layouts_for(model, granularity, 16, "all")
    fisher = fisher_scores(model, layouts, make_batches(), num_batches=2)
    budgets = {name: 0.2 * layout.numel for name, layout in layouts.items()}
    mask = place(layouts, granularity, budgets, magnitude_scores(model))
    scores = {f"fisher/{granularity}/{name}": fisher(name, layout) for name, layout in layouts.items()}
    return scores | {f"magnitude/{granularity}/{name}": units for name, units in mask.units.items()}


def narrowed(model: ShardedModel) -> dict[str, torch.Tensor]:
    """Scores after some steps on a random pool; blocks of 16 do not divide rows of 36 and 50."""
    layouts = layouts_for(model, "block", 16, "linear")
    pool = random_mask(layouts, "block", 0.3, seed=0)
    cfg = make_config()
    scores = narrow_scores(model, pool, make_batches(), NARROW, cfg.probe, cfg.train)
    return {f"narrow/{name}": scores(name, layout) for name, layout in layouts.items()}


def competing(model: ShardedModel) -> dict[str, torch.Tensor]:
    """The mask that the target alone makes, with floors and caps."""
    cfg = make_config()
    mask = MaskConfig(density=0.1, granularity="block", block=16, floor=0.02, cap=0.3)
    placed = project_task(
        model, None, "t", make_batches, mask=mask, projection=ProjectionConfig("target"), probe=cfg.probe,
        train=cfg.train, seed=0,
    )  # fmt: skip
    return {f"target/{name}": units for name, units in placed.units.items()}


def identity(model: ShardedModel) -> tuple[dict[str, torch.Tensor], Any]:
    """The mask of the first layer's entries, in blocks, and of their channels in the second, which the copy lacks."""
    cfg, mask = make_config(), MaskConfig(density=0.1, granularity="block", block=16)
    layouts = layouts_for(make_model(num_hidden_layers=1), "block", 16, "linear")
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(layout.num_units, generator=generator) for name, layout in layouts.items()}
    proxy_mask = mask_from_scores(scores, layouts, "block", 0.1)
    placed = project_task(
        model, proxy_mask, "t", make_batches, mask=mask, projection=ProjectionConfig("identity"), probe=cfg.probe,
        train=cfg.train, seed=0, shown=Shown(scores, layouts, Origin("", "model.layers", [0])),
    )  # fmt: skip
    return {f"identity/{name}": units for name, units in placed.units.items()}, placed.meta["matching"]


def cut_units(model: ShardedModel) -> int:
    """How many rows of matrices are cut by the edge of a shard."""
    cuts = [
        (view.stop, model.shape(name)[-1], model.shape(name))
        for name in model.names()
        for view in model.views(name)[:-1]
    ]
    return sum(stop % cols != 0 for stop, cols, shape in cuts if len(shape) == 2)


if __name__ == "__main__":
    dist.init_distributed()
    main(Path(sys.argv[1]), sys.argv[2])
