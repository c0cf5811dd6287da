"""Train one task's mask on a sharded model, with checkpoints that resume exactly, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

from trace_dist.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from trace_dist.config import TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.masks.format import Mask
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.learner import MaskedLearner
from trace_dist.train.loop import MetricLog, TrainResult, make_schedule, train_steps
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def train_mask(
    model: ShardedModel,
    mask: Mask,
    batches: Batches,
    cfg: TrainConfig,
    steps: int,
    *,
    description: str,
    log: MetricLog | None = None,
    checkpoints: Path | None = None,
) -> tuple[TrainResult, MaskedLearner]:
    """Train the entries of a mask; the model then holds the tuned values. Collective.

    Args:
        model: the sharded model.
        mask: what may change.
        batches: the task's global batches.
        cfg: options of optimizer and loop.
        steps: optimizer steps.
        description: label of progress and logs.
        log: where scalars go.
        checkpoints: folder of checkpoints; the newest one there is continued. None keeps none.

    Returns:
        What was measured, and the learner (for its optimizer state).
    """
    learner = MaskedLearner(model, mask, cfg)
    schedule = make_schedule(learner.optimizer, cfg, steps)
    first_step = 0
    newest = latest_checkpoint(checkpoints) if checkpoints is not None else None
    if newest is not None:
        manifest = load_checkpoint(newest, learner.optimizer)
        schedule.load_state_dict(manifest["state"]["schedule"])
        for group, rate in zip(learner.optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        batches.load_state_dict(manifest["state"]["batches"])
        first_step = manifest["step"]
        logger.info("%s: continuing after step %d from %s", description, first_step, newest)

    def keep(step: int) -> None:
        if checkpoints is not None and cfg.checkpoint_every and step % cfg.checkpoint_every == 0:
            state = {"schedule": schedule.state_dict(), "batches": batches.state_dict()}
            save_checkpoint(checkpoints, step, learner.optimizer, state)

    result = train_steps(
        learner,
        batches,
        cfg,
        steps,
        description=description,
        log=log,
        schedule=schedule,
        first_step=first_step,
        on_step=keep,
    )
    return result, learner
