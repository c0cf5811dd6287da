"""Stage ``project``: the proxy's masks become masks of the large, sharded model.

<run_dir>/masks/<task>.safetensors          projected mask
<run_dir>/masks/random/<task>.safetensors   random mask of the same density, for comparison
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trace_dist.config import RunConfig
from trace_dist.masks.format import Mask
from trace_dist.masks.ops import Scores, layouts_for, place, random_mask, tensor_seed
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.roles import describe
from trace_dist.probe.probe import proxy_mask_path
from trace_dist.probe.target import fisher_scores, narrow_scores
from trace_dist.projection.budget import project_budgets, scale_budgets
from trace_dist.projection.placement import magnitude_scores, seeded_scores
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.bases import load_target, prepare_base
from trace_dist.train.workbench import Stream, Workbench
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def mask_path(cfg: RunConfig, task: str, kind: str = "projected") -> Path:
    """Where a task's mask of the target lies; ``kind`` is projected or random."""
    folder = Path(cfg.run_dir) / "masks"
    return (folder if kind == "projected" else folder / kind) / f"{task}.safetensors"


def run_project(cfg: RunConfig) -> None:
    """Project every task's mask onto the target. Collective."""
    path = prepare_base(cfg.target, cfg, "target")
    model = load_target(cfg, path)
    project_masks(model, cfg, Workbench.load(cfg, path), fingerprint(path))


def project_masks(model: ShardedModel, cfg: RunConfig, bench: Workbench, model_id: str) -> None:
    """Write every task's projected and random mask of a sharded target, which is left as it was. Collective.

    Args:
        model: the target.
        cfg: the run.
        bench: its data.
        model_id: fingerprint of the target.

    Raises:
        ValueError: the proxy has not been probed.
    """
    if cfg.proxy is None:
        logger.info(
            "project: the target was probed itself, so its masks are kept; the section projection is not used"
        )
    for stream in bench.tasks:
        project_stream(model, cfg, bench, stream, model_id)


def project_stream(
    model: ShardedModel, cfg: RunConfig, bench: Workbench, stream: Stream, model_id: str
) -> None:
    """Write one task's projected and random mask; arguments and errors as ``project_masks``. Collective."""
    mask, task = cfg.mask, stream.task.name
    layouts = layouts_for(model, mask.granularity, mask.block, mask.maskable)
    index = [other.task.name for other in bench.tasks].index(task)
    projected = project_task(model, cfg, bench, stream)
    random = random_mask(layouts, mask.granularity, mask.density, cfg.seed + index)
    if dist.is_main():
        projected.with_meta(task=task, model=model_id).save(mask_path(cfg, task))
        random.with_meta(task=task, model=model_id).save(mask_path(cfg, task, "random"))
    logger.info("project %s: %s, density %.4f", task, projected.meta["method"], projected.density)
    dist.barrier()


def project_task(model: ShardedModel, cfg: RunConfig, bench: Workbench, stream: Stream) -> Mask:
    """The mask of one task on the target. Collective."""
    path = proxy_mask_path(cfg, stream.task.name)
    if not path.is_file():
        raise ValueError(f"{path}: the proxy has no mask for this task; start `trace-dist probe` first")
    proxy_mask = Mask.load(path)
    mask = cfg.mask
    layouts = layouts_for(model, mask.granularity, mask.block, mask.maskable)
    if cfg.proxy is None:
        return replace(proxy_mask, meta={"method": "probed"})  # the target was probed itself
    proxy_infos = describe({name: layout.shape for name, layout in proxy_mask.layouts.items()})
    budgets = project_budgets(proxy_mask, proxy_infos, layouts, describe(model.module), mask.density)
    scores = _scores(model, cfg, bench, stream, budgets)
    return place(layouts, mask.granularity, budgets, scores).with_meta(
        method=f"projected/{cfg.projection.placement}"
    )


def _scores(
    model: ShardedModel, cfg: RunConfig, bench: Workbench, stream: Stream, budgets: dict[str, float]
) -> Scores:
    placement, mask = cfg.projection.placement, cfg.mask
    if placement == "magnitude":
        return magnitude_scores(model)
    if placement == "random":
        return seeded_scores(tensor_seed(cfg.seed, stream.task.name))  # tasks get different places
    layouts = layouts_for(model, mask.granularity, mask.block, mask.maskable)
    batches = bench.batches([stream], cfg.probe.batch_size)
    if placement == "refine":
        return fisher_scores(model, layouts, batches, cfg.probe.fisher_batches)
    pool_budgets = scale_budgets(budgets, layouts, cfg.projection.pool_density)
    pool = place(layouts, mask.granularity, pool_budgets, magnitude_scores(model))
    return narrow_scores(model, pool, batches, cfg, f"narrow {stream.task.name}")
