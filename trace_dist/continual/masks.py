"""The target's masks of a run: read, or projected where they are missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trace_dist.config import RunConfig
from trace_dist.masks.format import Mask
from trace_dist.masks.ops import layouts_for, random_mask
from trace_dist.projection.project import project_task
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.setup import Stream, Workbench
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def mask_for(
    cfg: RunConfig, model: ShardedModel, bench: Workbench, stream: Stream, model_id: str, kind: str = "projected"
) -> Mask:  # fmt: skip
    """The mask of one task on the target; made unless one of this model and placement is there. Collective.

    Args:
        cfg: the run.
        model: the target, which is left as it was.
        bench: the run's data.
        stream: the task.
        model_id: fingerprint of the target.
        kind: ``projected``, or ``random`` (of the same density, for comparison).

    Raises:
        ValueError: the proxy has not been probed.
    """
    task = stream.task.name
    path = cfg.folder.mask(task, kind)
    if not dist.broadcast_object(_is_kept(cfg, path, model_id, kind)):
        mask = _random(cfg, model, stream) if kind == "random" else _projected(cfg, model, bench, stream)
        if dist.is_main():
            mask.with_meta(task=task, model=model_id).save(path)
        if kind != "random":
            logger.info("project %s: %s, density %.4f", task, mask.meta["method"], mask.density)
        dist.barrier()
    return Mask.load(path)


def _is_kept(cfg: RunConfig, path: Path, model_id: str, kind: str) -> bool:
    method = kind if kind == "random" else f"projected/{cfg.projection.placement}" if cfg.proxy else "probed"
    meta = Mask.load(path).meta if path.is_file() else {}
    return (meta.get("model"), meta.get("method")) == (model_id, method)


def _random(cfg: RunConfig, model: ShardedModel, stream: Stream) -> Mask:
    mask = cfg.mask
    layouts = layouts_for(model, mask.granularity, mask.block, mask.maskable)
    index = [task.name for task in cfg.tasks].index(stream.task.name)
    return random_mask(layouts, mask.granularity, mask.density, cfg.seed + index)


def _projected(cfg: RunConfig, model: ShardedModel, bench: Workbench, stream: Stream) -> Mask:
    path = cfg.folder.proxy_mask(stream.task.name)
    if not path.is_file():
        raise ValueError(f"{path}: the proxy has no mask for this task; start `trace-dist probe` first")
    proxy_mask = Mask.load(path)
    if cfg.proxy is None:
        # The target was probed itself.
        return replace(proxy_mask, meta={"method": "probed"})
    return project_task(
        model,
        proxy_mask,
        stream.task.name,
        lambda: bench.batches([stream], cfg.probe.batch_size),
        mask=cfg.mask,
        projection=cfg.projection,
        probe=cfg.probe,
        train=cfg.train,
        seed=cfg.seed,
    )
