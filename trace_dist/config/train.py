"""Masked training of one task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from trace_dist.config.checks import AUTO, Rate, Section, check

StateDtype = Literal["float32", "bfloat16", "8bit"]
LEAST_EPS = 1e-37
"""Of AdamW: what is much smaller is 0 in fp32, and an entry without a gradient would become 0/0."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """Masked training of one task."""

    section: ClassVar[str] = "train"

    steps: int = 300
    """Optimizer steps per task."""
    lr: Rate = 3e-3
    """Peak learning rate of every method without one of its own; `auto`: each races for the best (section `race`)."""
    batch_size: int = 64
    """Examples per optimizer step over all ranks (global batch)."""
    micro_batch_size: int = 64
    """Examples per forward and backward pass on one rank, or rows with `data.packing`; smaller values accumulate gradients."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on masked entries only."""
    max_grad_norm: float | None = 1.0
    """Global gradient norm over masked entries above which gradients are scaled down; null for none."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    scheduler: str = "cosine_with_min_lr"
    """Name of a transformers learning-rate schedule."""
    min_lr_ratio: float = 0.1
    """Final learning rate over the peak, for schedules with a minimum."""
    state_dtype: StateDtype = "float32"
    """Data type of AdamW's moments: float32, bfloat16, or 8bit (blockwise codes, 1 byte)."""
    master: bool = True
    """Keep an fp32 copy of masked bf16 weights; without it they are rounded stochastically."""
    offload: Literal["none", "cpu"] = "none"
    """Where moments and master live: none is beside the weights, cpu is host memory, where the update then runs."""
    sequence_parallel: int = 1
    """Ranks that share the rows of a micro-batch, one after another: each holds a slice of the activations and logits, and some
    of the attention heads while it attends. It must divide the ranks and fit the heads; batches are those of that many times
    fewer ranks (docs/clusters.md)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; null: by time, 0 keeps none."""
    checkpoint_minutes: float = 3.0
    """Minutes of work between checkpoints by time; more where writing one would take over 5 % of them."""
    checkpoint_async: bool = True
    """Write checkpoints while training goes on, from a copy in host memory; false: training waits until they are written."""
    checkpoint_keep: int = 2
    """Checkpoints of a training that stay: the newest that are whole. An older one serves where the newest turns out damaged."""
    max_bad_steps: int = 3
    """Steps in a row with an infinite or NaN loss or gradient that are skipped: nothing of them is kept, and the log and
    metrics.jsonl name their examples and ranks. One more ends the training; 0: the first does."""
    spike_factor: float | None = None
    """A loss above this many times the median of the last 16 takes the training back to its newest checkpoint; it goes on from
    there with the examples that come next, so that those since the checkpoint are left out. null: losses may jump."""
    spike_rollbacks: int = 3
    """How often a task's training may go back so; the next jump ends it."""
    log_every: int = 10
    """Steps between log lines and points of the trackers."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where scalars go beside metrics.jsonl: tensorboard, wandb, trackio, mlflow and the others of accelerate, or the path of a
    class of your own."""
    eval_every: int = 0
    """Steps between looks at a task's validation examples (docs/data.md); the last step is looked at too. 0: there are none."""
    eval_by: Literal["loss", "metric"] = "loss"
    """What makes a look the best: loss is the least validation loss; metric is the highest score by the task's own metric, which
    is then measured at each look, generation included, and of equal scores the one with the least loss."""
    patience: int | None = None
    """Looks in a row without a better one after which a task's training stops; null: it goes on to the last step."""
    keep: Literal["best", "last"] = "best"
    """Which values a training leaves where it looks at validation examples: those of the best look, or of the last step."""

    def check(self) -> None:
        self.at_least(1, "steps", "batch_size", "micro_batch_size", "log_every", "checkpoint_keep")
        self.at_least(1, "sequence_parallel")
        self.at_least(0, "warmup_steps", "checkpoint_every", "eval_every", "max_bad_steps", "spike_rollbacks")
        self.at_least(1, "patience")
        self._check_looks()
        self._check_spikes()
        self.rates("lr")
        self.positive("eps", "max_grad_norm", "checkpoint_minutes")
        rule, cure = "is too small for fp32", f"use at least {LEAST_EPS}, for example 1e-8"
        check(self.eps >= LEAST_EPS, "train.eps", self.eps, rule, cure)
        rates = all(0 <= beta < 1 for beta in self.betas)
        check(rates, "train.betas", self.betas, "both must lie in [0, 1)", "use for example [0.9, 0.98]")
        ratio, inside = self.min_lr_ratio, 0 <= self.min_lr_ratio <= 1
        check(inside, "train.min_lr_ratio", ratio, "must lie in [0, 1]", "use for example 0.1")
        decay = self.weight_decay
        check(decay >= 0, "train.weight_decay", decay, "must not be negative", "use 0")

    def _check_spikes(self) -> None:
        factor = self.spike_factor
        rule, cure = "must be above 1", "use for example 2, or null"
        check(factor is None or factor > 1, "train.spike_factor", factor, rule, cure)
        rule, cure = "needs checkpoints to go back to", "set train.checkpoint_every"
        check(factor is None or self.checkpoint_every != 0, "train.spike_factor", factor, rule, cure)

    def _check_looks(self) -> None:
        rule, cure = "says something of validation, but train.eval_every is 0", "set train.eval_every"
        for key, usual in (("patience", None), ("eval_by", "loss"), ("keep", "best")):
            value = getattr(self, key)
            check(self.eval_every > 0 or value == usual, f"train.{key}", value, rule, cure)

    def strict(self) -> TrainConfig:
        """For a trial, whose answer is whether training goes well: the first bad step ends it, and nothing goes back."""
        return replace(self, max_bad_steps=0, spike_factor=None)

    @property
    def rate(self) -> float:
        """``lr`` as a number.

        Raises:
            ValueError: it is ``auto``, and nothing races here.
        """
        if self.lr == AUTO:
            raise ValueError(f"train.lr={self.lr!r}: nothing races for a rate here; give a number")
        return self.lr
