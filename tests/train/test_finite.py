"""Training that diverges stops in the step where it does, on whatever learner, and leaves nothing broken behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.resuming import CONFIG as LENIENT
from engine.resuming import PLAIN, STEPS, make_batches

from trace_dist import shard
from trace_dist.checkpoint import latest_checkpoint
from trace_dist.config import TrainConfig
from trace_dist.train.learner import DenseLearner, Learner, MaskedLearner
from trace_dist.train.loop import TrainResult, train_steps
from trace_dist.train.task import train_mask
from trace_dist.utils.finite import NotFinite

Spoil = Callable[[Learner], None]
CONFIG = replace(LENIENT, max_bad_steps=0)


def masked(cfg: TrainConfig) -> Learner:
    model = shard(PLAIN.model(), "single")
    return MaskedLearner(model, PLAIN.mask(model), cfg)


def dense(cfg: TrainConfig) -> Learner:
    module = PLAIN.model()
    return DenseLearner(module, module.parameters(), cfg)


def gradient_of(learner: Learner) -> torch.Tensor:
    if isinstance(learner, MaskedLearner):
        return learner.optimizer.supports[0].grad
    return next(parameter.grad for parameter in learner.parameters if parameter.grad is not None)


def spoil_at(learner: Learner, step: int, spoil: Spoil) -> None:
    """Spoil something between the backward pass and the update of a step."""
    whole, done = learner.accumulate, iter(range(1, STEPS + 1))

    def accumulate(batch):
        loss = whole(batch)
        if next(done) == step:
            spoil(learner)
        return loss

    learner.accumulate = accumulate


def spoil_gradient(value: float) -> Spoil:
    def spoil(learner: Learner) -> None:
        gradient_of(learner).view(-1)[0] = value

    return spoil


def spoil_rate(learner: Learner) -> None:
    learner.optimizer.param_groups[0]["lr"] = math.inf


def spoil_moment(learner: Learner) -> None:
    """What an optimizer's own fault would leave: no loss of this step shows it."""
    if isinstance(learner, MaskedLearner):
        learner.optimizer.compact()[0][1]["exp_avg"][0] = math.nan
    else:
        learner.optimizer.state[learner.parameters[0]]["exp_avg"].view(-1)[0] = math.nan


def weights(learner: Learner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in learner.module.parameters()]


@pytest.mark.parametrize("clips", [True, False], ids=["clips", "fused"])
@pytest.mark.parametrize("make", [masked, dense])
@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoil_gradient(math.nan), "the gradient norm is nan"),
        (spoil_gradient(-math.inf), "the gradient norm is inf"),
        (spoil_rate, "the learning rate is inf"),
    ],
    ids=["nan", "inf", "rate"],
)
def test_the_step_where_it_happens_changes_nothing(
    make: Callable[[TrainConfig], Learner], spoil: Spoil, problem: str, clips: bool
) -> None:
    cfg = replace(CONFIG, max_grad_norm=1.0 if clips else None)
    learner, before = make(cfg), list[torch.Tensor]()

    def remember_and_spoil(learner: Learner) -> None:
        before.extend(weights(learner))
        spoil(learner)

    spoil_at(learner, 4, remember_and_spoil)
    batches = make_batches()
    message = rf"^a\.lr=0\.01: twist: {problem} at step 4 of 9; lower a\.lr and start the same command again.* \(numbers "
    with pytest.raises(NotFinite, match=message) as refusal:
        train_steps(learner, batches, cfg, STEPS, description="twist", rate="a.lr")
    assert all(map(torch.equal, weights(learner), before))
    assert len(batches.last_rows()) == CONFIG.batch_size
    assert f"(numbers {', '.join(map(str, batches.last_rows()))})" in str(refusal.value)


def test_what_helps_may_be_something_else() -> None:
    """Where the rate cannot be lowered any more."""
    learner = dense(CONFIG)
    spoil_at(learner, 1, spoil_rate)
    with pytest.raises(
        NotFinite, match=r"^a\.lr=0\.01: twist: .*; do this instead, or look at the training examples"
    ):
        train_steps(
            learner, make_batches(), CONFIG, STEPS, description="twist", rate="a.lr", cure="do this instead"
        )


@pytest.mark.parametrize("make", [masked, dense])
@pytest.mark.parametrize("spoil", [spoil_gradient(math.nan), spoil_moment], ids=["gradient", "moment"])
def test_the_last_step_is_looked_at_too(make: Callable[[TrainConfig], Learner], spoil: Spoil) -> None:
    learner = make(replace(CONFIG, max_grad_norm=None))
    spoil_at(learner, STEPS, spoil)
    with pytest.raises(NotFinite, match=f"at step {STEPS} of {STEPS}"):
        train_steps(learner, make_batches(), CONFIG, STEPS)


class Diverging(MaskedLearner):
    """Its fifth update meets what ``spoil`` leaves."""

    spoil: Spoil

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        spoil_at(self, 5, type(self).spoil)


@pytest.mark.parametrize("spoil", [spoil_gradient(math.nan), spoil_moment], ids=["gradient", "moment"])
def test_a_good_checkpoint_is_not_replaced_and_a_lower_rate_continues_it(
    spoil: Spoil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(CONFIG, checkpoint_every=1, max_grad_norm=None)
    with monkeypatch.context() as patch:
        patch.setattr(Diverging, "spoil", staticmethod(spoil), raising=False)
        patch.setattr("trace_dist.train.task.MaskedLearner", Diverging)
        with pytest.raises(NotFinite, match=r"^train\.lr=0\.01: twist: .* at step 5 of 9"):
            train(tmp_path, cfg)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000004"
    lower = replace(cfg, lr=1e-3)
    result, learner = train(tmp_path, lower)
    assert [step for step, _ in result.losses] == list(range(1, STEPS + 1))
    uncut = masked(lower)
    train_steps(uncut, make_batches(), lower, STEPS)
    assert learner.optimizer.param_groups[0]["lr"] == uncut.optimizer.param_groups[0]["lr"] < 1e-3


def train(folder: Path, cfg: TrainConfig) -> tuple[TrainResult, MaskedLearner]:
    model = shard(PLAIN.model(), "single")
    mask, batches = PLAIN.mask(model), make_batches()
    return train_mask(model, mask, batches, cfg, STEPS, description="twist", checkpoints=folder)
