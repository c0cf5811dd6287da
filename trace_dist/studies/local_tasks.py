"""Tasks of data that nothing installs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trace_dist.config import RunConfig
from trace_dist.config.task import TaskConfig
from trace_dist.utils.home import from_home
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def with_local_tasks(cfg: RunConfig, tasks: Sequence[TaskConfig]) -> RunConfig:
    """The run with those of some further tasks whose data are there."""
    there = [task for task in tasks if from_home(str(task.path)).exists()]
    missing = [task.name for task in tasks if task not in there]
    if missing:
        logger.info("study.local_tasks: not there, and left out: %s", ", ".join(missing))
    return replace(cfg, tasks=[*cfg.tasks, *there])
