"""Train one task, with checkpoints that resume exactly; masks on a sharded model on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from trace_dist.checkpoint import Background, latest_checkpoint, write_checkpoint
from trace_dist.checkpoint.format import MANIFEST
from trace_dist.config import TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.masks.mask import Mask
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.cadence import Cadence
from trace_dist.train.learner import Learner, MaskedLearner
from trace_dist.train.loop import TrainResult, cure_of, train_steps
from trace_dist.train.metric_log import MetricLog
from trace_dist.train.schedule import continue_schedule, make_schedule
from trace_dist.train.validation import Validation, Validator, best_of
from trace_dist.utils.agreement import agree
from trace_dist.utils.files import reading
from trace_dist.utils.finite import NotFinite
from trace_dist.utils.log import get_logger
from trace_dist.utils.stopping import Stopped

logger = get_logger(__name__)


def train_mask(
    model: ShardedModel,
    mask: Mask,
    batches: Batches,
    cfg: TrainConfig,
    steps: int,
    *,
    horizon: int | None = None,
    scale: Mapping[str, Tensor] | None = None,
    description: str,
    rate: str = "train.lr",
    cure: str | None = None,
    log: MetricLog | None = None,
    checkpoints: Path | None = None,
    validation: Validation | None = None,
) -> tuple[TrainResult, MaskedLearner]:
    """Train the entries of a mask; the model then holds the tuned values. Collective.

    Args:
        model: the sharded model.
        mask: what may change.
        batches: the task's global batches.
        cfg: options of optimizer and loop.
        steps: optimizer steps.
        horizon: those over which the rate falls, where these are only the first of them (``make_schedule``).
        scale: factors on the learning rate, as of ``MaskedAdamW``.
        description: label of progress and logs; names the task.
        rate: the field that sets the learning rate, for messages.
        cure: as of ``train_steps``.
        log: where scalars go.
        checkpoints: folder of checkpoints; the newest one there is continued. None keeps none, as ``cfg.checkpoint_every=0``.
        validation: what is looked at every ``cfg.eval_every`` steps; the model then holds what ``cfg.keep`` says.

    Returns:
        What was measured, a resumed run's earlier parts included, and the learner (for its optimizer state).

    Raises:
        ValueError: the ranks differ, or the newest checkpoint is of another training.
        NotFinite: training diverged; nothing of it was kept.
    """
    learner = MaskedLearner(model, mask, cfg, scale=scale)
    result = train_learner(
        learner,
        batches,
        cfg,
        steps,
        horizon=horizon,
        description=description,
        rate=rate,
        cure=cure,
        log=log,
        checkpoints=checkpoints,
        validation=validation,
    )
    return result, learner


def train_learner(
    learner: Learner,
    batches: Batches,
    cfg: TrainConfig,
    steps: int,
    *,
    horizon: int | None = None,
    description: str,
    rate: str = "train.lr",
    cure: str | None = None,
    log: MetricLog | None = None,
    checkpoints: Path | None = None,
    validation: Validation | None = None,
) -> TrainResult:
    """Train any learner, from its newest checkpoint if there is one. Arguments and errors as ``train_mask``."""
    root = None if cfg.checkpoint_every == 0 else checkpoints
    newest = None if root is None else latest_checkpoint(root)
    agree({"checkpoint": newest and newest.name})
    schedule = make_schedule(learner.optimizer, cfg, steps, horizon)
    first_step, result = 0, TrainResult()
    validator = None
    if validation is not None and cfg.eval_every > 0:
        validator = Validator(validation, cfg, steps)
    if newest is not None:
        first_step, result, state = _load(learner, newest)
        with reading(newest / MANIFEST, "checkpoint"):
            position = {name: int(value) for name, value in state["batches"].items()}
            kept = state.get("best_step")
        if first_step > steps:
            raise ValueError(
                f"train.steps={steps}: {newest} has done {first_step} steps; raise it, or delete that folder to start anew"
            )
        if validator is not None:
            validator.check_kept(result.looks, None if learner.best is None else kept)
        continue_schedule(schedule, first_step)
        cure = (
            f"{cure or cure_of(rate)}, or delete {root} to begin anew (this went on after step {first_step})"
        )
        batches.load_state_dict(position)
        logger.info("%s: continuing after step %d from %s", description, first_step, newest)
    with nullcontext() if root is None else Checkpoints(root, cfg, learner, batches) as keeper:
        return train_steps(
            learner,
            batches,
            cfg,
            steps,
            description=description,
            rate=rate,
            cure=cure,
            log=log,
            schedule=schedule,
            first_step=first_step,
            result=result,
            keeper=keeper,
            validator=validator,
        )


def _load(learner: Learner, folder: Path) -> tuple[int, TrainResult, dict[str, Any]]:
    """Let a learner hold a checkpoint; its step, what was measured up to there, and the rest of its state. Collective."""
    manifest = learner.load(folder)
    state = manifest["state"]
    with reading(folder / MANIFEST, "checkpoint"):
        # A checkpoint of an earlier version has no curve.
        result = TrainResult.from_json(state["result"]) if "result" in state else TrainResult()
    return manifest["step"], result, state


class Checkpoints:
    """Writes the checkpoints of one training, when they are due; what is being written at the end of the block is waited for.

    Args:
        root: their folder.
        cfg: when they are due, how many stay, and whether training waits for them.
        learner: what is kept.
        batches: whose position is kept.
    """

    def __init__(self, root: Path, cfg: TrainConfig, learner: Learner, batches: Batches) -> None:
        self._root, self._learner, self._batches = root, learner, batches
        self._cadence = Cadence(cfg.checkpoint_every, cfg.checkpoint_minutes)
        self._num_kept = cfg.checkpoint_keep
        self._background = Background() if cfg.checkpoint_async else None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._background is None:
            return
        try:
            # Those errors come up on all ranks in the same step; after any other one, the others may be in the middle of theirs.
            if kind is None or issubclass(kind, (Stopped, NotFinite)):
                self._background.finish()
        finally:
            self._background.close()

    def attend(self) -> None:
        if self._background is not None:
            self._background.attend()

    def due(self, step: int) -> bool:
        return self._cadence.due(step)

    def keep(self, step: int, result: TrainResult) -> None:
        state: dict[str, Any] = {"batches": self._batches.state_dict(), "result": result.to_json()}
        if self._learner.best is not None:
            state["best_step"] = best_of(result.looks).step
        write = write_checkpoint if self._background is None else self._background.save
        self._cadence.measure(lambda: self._learner.save(self._root, step, state, self._num_kept, write))

    def go_back(self) -> tuple[int, TrainResult]:
        if self._background is not None:
            self._background.finish()
        newest = latest_checkpoint(self._root)
        if newest is None:
            raise ValueError(
                f"{self._root}: no checkpoint is whole any more; start the same command again to begin anew"
            )
        step, result, _ = _load(self._learner, newest)
        return step, result
