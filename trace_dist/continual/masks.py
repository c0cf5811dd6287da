"""A task's masks of the target, made from the proxy's."""

from __future__ import annotations

from dataclasses import replace

from trace_dist.config import RunConfig
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import layouts_for, random_mask
from trace_dist.projection.project import project_task
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.workbench import Stream, Workbench
from trace_dist.utils.log import get_logger
from trace_dist.utils.together import on_main

logger = get_logger(__name__)


def project_stream(
    model: ShardedModel, cfg: RunConfig, bench: Workbench, stream: Stream, model_id: str
) -> None:
    """Write one task's projected mask, and a random one of the same density for comparison. Collective.

    Args:
        model: the target, which is left as it was.
        cfg: the run.
        bench: its data.
        stream: the task.
        model_id: fingerprint of the target.

    Raises:
        ValueError: the proxy has not been probed.
    """
    mask, task = cfg.mask, stream.task.name
    layouts = layouts_for(model, mask.granularity, mask.block, mask.maskable)
    index = [other.task.name for other in bench.tasks].index(task)
    projected = _projected(model, cfg, bench, stream)
    random = random_mask(layouts, mask.granularity, mask.density, cfg.seed + index)

    def write() -> None:
        projected.with_meta(task=task, model=model_id).save(cfg.folder.mask(task))
        random.with_meta(task=task, model=model_id).save(cfg.folder.mask(task, "random"))

    on_main(write)
    logger.info("project %s: %s, density %.4f", task, projected.meta["method"], projected.density)


def is_projected(cfg: RunConfig, task: str, model_id: str) -> bool:
    """Whether a task's masks of this target, by this placement, are there.

    Raises:
        ValueError: one of them is corrupt.
    """
    placement = "probed" if cfg.proxy is None else f"projected/{cfg.projection.placement}"
    for kind, method in (("projected", placement), ("random", "random")):
        path = cfg.folder.mask(task, kind)
        meta = Mask.load(path).meta if path.is_file() else {}
        if (meta.get("model"), meta.get("method")) != (model_id, method):
            return False
    return True


def _projected(model: ShardedModel, cfg: RunConfig, bench: Workbench, stream: Stream) -> Mask:
    path = cfg.folder.proxy_mask(stream.task.name)
    if not path.is_file():
        raise ValueError(f"{path}: is not there yet; start `trace-dist probe` first")
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
