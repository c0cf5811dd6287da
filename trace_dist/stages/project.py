"""Stage ``project``: the proxy's masks become masks of the large, sharded model; random ones lie beside them for comparison."""

from __future__ import annotations

from trace_dist.config import RunConfig
from trace_dist.continual.masks import mask_for
from trace_dist.models.fingerprint import fingerprint
from trace_dist.stages.base import prepare_base
from trace_dist.stages.stage import Stage
from trace_dist.train.setup import Workbench
from trace_dist.train.target import load_target
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
KINDS = ("projected", "random")


def describe(cfg: RunConfig) -> Stage:
    """Project the masks of all tasks."""
    folder, names = cfg.folder, [task.name for task in cfg.tasks]
    masks = [folder.mask(name, kind) for name in names for kind in KINDS]
    inputs = {folder.proxy_mask(name): "probe" for name in names}
    return Stage("project", ["project"], masks, inputs, launched=True)


def run_project(cfg: RunConfig) -> None:
    """Project every task's mask onto the target; masks that are there are kept. Collective.

    Raises:
        ValueError: the proxy has not been probed.
    """
    describe(cfg).check_inputs()
    path = prepare_base(cfg, "target")
    bench = Workbench.load(cfg, path)
    model = load_target(cfg.target, cfg.backend)
    if cfg.proxy is None:
        logger.info(
            "project: the target was probed itself; its masks are kept, the section projection is not used"
        )
    for stream in bench.tasks:
        for kind in KINDS:
            mask_for(cfg, model, bench, stream, fingerprint(path), kind)
