"""Stage ``project``: the proxy's masks become masks of the large, sharded model; random ones lie beside them for comparison."""

from __future__ import annotations

from trace_dist.config import RunConfig
from trace_dist.continual.density import with_density
from trace_dist.continual.masks import KINDS, is_projected
from trace_dist.continual.setting import Setting
from trace_dist.projection.project import needs_proxy
from trace_dist.stages.base import prepare_base
from trace_dist.stages.stage import Stage
from trace_dist.stages.words import listed
from trace_dist.utils.log import get_logger, outcome
from trace_dist.utils.together import on_main

logger = get_logger(__name__)


def describe(cfg: RunConfig) -> Stage:
    """Project the masks of all tasks."""
    folder, names = cfg.folder, [task.name for task in cfg.tasks]
    masks = [folder.mask(name, kind) for name in names for kind in KINDS]
    inputs = {folder.proxy_mask(name): "probe" for name in names} if needs_proxy(cfg.projection) else {}
    return Stage("project", ["project"], masks, inputs, launched=True)


def run_project(cfg: RunConfig) -> None:
    """Project every task's mask onto the target; masks that are there are kept. Collective.

    Raises:
        ValueError: the proxy has not been probed.
    """
    on_main(describe(cfg).check_inputs)
    prepare_base(cfg, "target")
    setting = with_density(Setting.load(cfg))
    cfg = setting.cfg
    if cfg.proxy is None and needs_proxy(cfg.projection):
        logger.info(
            "project: the target was probed itself; its masks are kept, the section projection is not used"
        )
    elif cfg.mask.granularity == "tensor" and needs_proxy(cfg.projection):
        logger.info("project: whole tensors go by role and depth; projection.placement is not used")
    for stream in setting.bench.tasks:
        name = stream.task.name
        if on_main(lambda name=name: is_projected(cfg, name, setting.fingerprint)):  # type: ignore[misc]
            logger.info("project %s: kept its masks", name)
        else:
            setting.project(stream)
    outcome(f"{listed([task.name for task in cfg.tasks])}: density {cfg.mask.share:g}")
