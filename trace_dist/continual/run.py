"""Stage ``continual``: run modes on the target, each once; a mode whose result exists is kept."""

from __future__ import annotations

from pathlib import Path

from trace_dist.config import RunConfig
from trace_dist.continual.baselines import run_baseline
from trace_dist.continual.sequence import Sequence, mode_path
from trace_dist.models.fingerprint import fingerprint
from trace_dist.probe.project import masks_missing, project_masks
from trace_dist.train.bases import load_target, prepare_base
from trace_dist.train.workbench import Workbench
from trace_dist.utils import dist
from trace_dist.utils.files import write_json
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
MASKED = ("retrieved", "merged", "random")


def tasks_path(cfg: RunConfig) -> Path:
    """Where the tasks' trivial baselines lie: majority answer, overlap of training and test prompts."""
    return Path(cfg.run_dir) / "tasks.json"


def _describe_tasks(cfg: RunConfig, bench: Workbench) -> None:
    tasks = [stream.task for stream in bench.tasks]
    write_json(
        tasks_path(cfg),
        {
            "majority": [task.majority_percent for task in tasks],
            "train_test_overlap": [task.overlap_percent for task in tasks],
            "num_train": [len(task.train) for task in tasks],
            "num_test": [len(task.test) for task in tasks],
        },
    )


def run_continual(cfg: RunConfig) -> None:
    """Run the modes of ``cfg.continual.modes`` that have no result yet; masks are projected where missing. Collective.

    Raises:
        ValueError: a baseline is asked of several ranks.
    """
    wanted = [mode for mode in cfg.continual.modes if not mode_path(cfg, mode).is_file()]
    for mode in sorted(set(cfg.continual.modes) - set(wanted)):
        logger.info("%s: kept the result %s", mode, mode_path(cfg, mode))
    masked = [mode for mode in wanted if mode in MASKED]
    dense = [mode for mode in wanted if mode not in MASKED]
    if dense and dist.world_size() > 1:
        raise ValueError(
            f"continual.modes={dense}: full and lora run in one process; start them without a launcher"
        )
    path = prepare_base(cfg.target, cfg, "target")
    bench = Workbench.load(cfg, path)
    if dist.is_main():
        _describe_tasks(cfg, bench)
    if masked:
        model = load_target(cfg, path)
        if masks_missing(cfg):
            project_masks(model, cfg, bench, fingerprint(path))
        sequence = Sequence(model, cfg, bench, fingerprint(path))
        for mode in masked:
            sequence.run(mode)
    for mode in dense:
        run_baseline(cfg, bench, path, mode)
