"""Steps with an infinite or NaN loss or gradient are skipped and counted; a loss that jumps takes the training back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from engine.resuming import CONFIG, PLAIN, STEPS, Cut, make_batches

from trace_dist import shard
from trace_dist.config import TrainConfig
from trace_dist.run_folder import RunFolder
from trace_dist.train.learner import DenseLearner, Learner, MaskedLearner
from trace_dist.train.loop import TrainResult
from trace_dist.train.metric_log import MetricLog
from trace_dist.train.task import train_learner
from trace_dist.utils import stopping
from trace_dist.utils.finite import NotFinite
from trace_dist.utils.stopping import Stopped

Make = Callable[[TrainConfig], Learner]
JUMPING = replace(CONFIG, steps=18, spike_factor=2.0, checkpoint_every=5, lr=1e-3)


def masked(cfg: TrainConfig) -> Learner:
    model = shard(PLAIN.model(), "single")
    return MaskedLearner(model, PLAIN.mask(model), cfg)


def dense(cfg: TrainConfig) -> Learner:
    module = PLAIN.model()
    return DenseLearner(module, module.parameters(), cfg)


class Spoiled:
    """Multiplies the loss of some global batches, counted from 0, or their gradient alone.

    Args:
        learner: what is trained.
        factors: batch -> factor.
        gradient: spoil the gradient alone.
    """

    def __init__(self, learner: Learner, factors: dict[int, float], gradient: bool = False) -> None:
        self.learner, self._factors, self._gradient = learner, factors, gradient
        self._size, self.weights = CONFIG.batch_size, dict[int, list[torch.Tensor]]()
        self._whole, self._back = learner.accumulate, learner.backward
        learner.accumulate, learner.backward = self._accumulate, self._backward  # type: ignore[method-assign]
        self._factor = 1.0

    def number(self, batches) -> None:
        """Read from the data which batch comes."""
        self._number: Callable[[], int] = lambda: batches.state_dict()["examples_consumed"] // self._size - 1

    def _accumulate(self, step):
        number = self._number()
        self.weights[number] = [each.detach().clone() for each in self.learner.module.parameters()]
        self._factor = self._factors.get(number, 1.0)
        loss = self._whole(step)
        return loss if self._gradient else loss * self._factor

    def _backward(self, loss):
        self._back(loss * self._factor)


def train(
    make: Make,
    cfg: TrainConfig,
    factors: dict[int, float],
    folder: Path,
    gradient: bool = False,
    last: int = 10**6,
) -> tuple[TrainResult, Spoiled]:
    learner, batches = make(cfg), make_batches(last)
    spoiled = Spoiled(learner, factors, gradient)
    spoiled.number(batches)
    log = MetricLog(RunFolder(folder), "t", trackers=())
    result = train_learner(
        learner, batches, cfg, cfg.steps, description="twist", log=log, checkpoints=folder / "kept"
    )
    return result, spoiled


def lines(folder: Path, key: str) -> list[dict]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if key in line]


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("clips", [True, False], ids=["clips", "fused"])
@pytest.mark.parametrize("make", [masked, dense])
def test_a_bad_step_changes_nothing_and_is_counted(
    make: Make, clips: bool, gradient: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = replace(CONFIG, max_grad_norm=1.0 if clips else None)
    result, spoiled = train(make, cfg, {3: math.nan, 4: math.inf, 7: math.nan}, tmp_path, gradient)
    assert result.skipped == [4, 5, 8]
    assert [step for step, _ in result.losses] == [1, 2, 3, 6, 7, 9]
    assert all(map(math.isfinite, result.grad_norms))
    assert all(map(torch.equal, spoiled.weights[4], spoiled.weights[3]))
    assert all(map(torch.equal, spoiled.weights[5], spoiled.weights[3]))
    assert not all(map(torch.equal, spoiled.weights[6], spoiled.weights[5]))
    found = lines(tmp_path, "bad_steps")
    assert [(line["step"], line["bad_steps"]) for line in found] == [(4, 1), (5, 2), (8, 3)]
    batches = make_batches()
    for _ in range(4):
        next(batches)
    assert found[0]["examples"] == batches.last_rows()
    assert ("the gradient norm is nan" if gradient else "the loss is nan") == found[0]["problem"]
    said = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert len(said) == 3
    assert "at step 4, which is skipped; 1 bad step so far (train.max_bad_steps=3 in a row)" in said[0]
    assert said[0].endswith(f"training examples {', '.join(map(str, batches.last_rows()))}")


def test_the_schedule_goes_on_where_a_step_is_skipped(tmp_path: Path) -> None:
    cfg = replace(CONFIG, log_every=1)
    train(masked, cfg, {}, tmp_path / "whole")
    train(masked, cfg, {3: math.nan}, tmp_path / "bad")
    rates = [{line["step"]: line["lr"] for line in lines(tmp_path / name, "lr")} for name in ("whole", "bad")]
    assert rates[1] == {step: rate for step, rate in rates[0].items() if step != 4}


def test_too_many_in_a_row_and_a_resumed_training_counts_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four in a row, stopped after the third of them, which leaves a checkpoint: continued, the first one more ends it."""
    bad = dict.fromkeys(range(3, 7), math.nan)
    with pytest.raises(
        NotFinite,
        match=r"the loss is nan, after 3 bad steps before it \(train\.max_bad_steps\) at step 7 of 9",
    ):
        train(masked, CONFIG, bad, tmp_path / "whole")
    cfg = replace(CONFIG, checkpoint_every=1)
    number = count(1)
    monkeypatch.setattr(stopping, "asked", lambda: next(number) == 6)
    with pytest.raises(Stopped, match="step 6 of 9 is done and kept"):
        train(masked, cfg, bad, tmp_path / "cut")
    again = (
        rf"or delete {re.escape(str(tmp_path / 'cut' / 'kept'))} to begin anew \(this went on after step 6\)"
    )
    with pytest.raises(
        NotFinite, match=rf"after 3 bad steps before it \(train\.max_bad_steps\) at step 7 of 9; .*{again}"
    ):
        train(masked, cfg, bad, tmp_path / "cut")
    assert sorted(path.name for path in (tmp_path / "cut" / "kept").iterdir())[-1] == "step-00000006"
    result, _ = train(masked, replace(cfg, max_bad_steps=4), bad, tmp_path / "cut")
    assert result.skipped == [4, 5, 6, 7]
    assert result.last_step == STEPS


def test_a_checkpoint_that_is_due_at_a_bad_step_waits_for_a_good_one(tmp_path: Path) -> None:
    """Weights from which training diverges would be gone on from at every lower rate, too."""
    cfg = replace(CONFIG, checkpoint_every=4, checkpoint_keep=9)
    bad = {3: math.nan, 4: math.nan}
    train(masked, cfg, bad, tmp_path / "some")
    assert sorted(path.name for path in (tmp_path / "some" / "kept").iterdir()) == [
        "step-00000006",
        "step-00000008",
    ]
    with pytest.raises(
        NotFinite, match=r"at step 6 of 9; lower train\.lr and start the same command again, or look"
    ):
        train(masked, cfg, dict.fromkeys(range(2, 6), math.nan), tmp_path / "all")
    assert not (tmp_path / "all" / "kept").exists()


@pytest.mark.parametrize("make", [masked, dense])
def test_a_jump_goes_back_and_leaves_examples_out(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Back from step 13 to the checkpoint of step 10; the next examples are those after the batch that jumped."""
    result, spoiled = train(make, JUMPING, {12: 50.0}, tmp_path)
    assert result.rollbacks == [(13, 10)]
    assert [step for step, _ in result.losses] == list(range(1, 19))
    assert all(map(torch.equal, spoiled.weights[13], spoiled.weights[10]))
    assert max(spoiled.weights) == 20
    (line,) = lines(tmp_path, "spike")
    assert (line["step"], line["back_to_step"]) == (13, 10)
    said = [record.getMessage() for record in caplog.records if "jumps" in record.getMessage()]
    assert len(said) == 1
    assert "back to the checkpoint of step 10, and on with the examples that come next;" in said[0]
    assert "those of steps 11 to 13 are left out" in said[0]


def test_a_jump_before_the_first_checkpoint_goes_back_to_the_beginning(tmp_path: Path) -> None:
    cfg = replace(JUMPING, checkpoint_every=100)
    result, spoiled = train(masked, cfg, {9: 50.0}, tmp_path)
    assert result.rollbacks == [(10, 0)]
    assert all(map(torch.equal, spoiled.weights[10], spoiled.weights[0]))


def test_a_training_that_was_cut_after_it_went_back_is_as_one_that_was_not(tmp_path: Path) -> None:
    """Bit for bit, whether a checkpoint followed the return or not."""
    whole, spoiled = train(masked, JUMPING, {12: 50.0}, tmp_path / "whole")
    for last in (15, 19):
        folder = tmp_path / f"cut-{last}"
        with suppress(Cut):
            train(masked, JUMPING, {12: 50.0}, folder, last=last)
        result, other = train(masked, JUMPING, {12: 50.0}, folder)
        assert (result.losses, result.grad_norms, result.rollbacks) == (
            whole.losses,
            whole.grad_norms,
            whole.rollbacks,
        )
        after = [[*each.learner.module.parameters()] for each in (spoiled, other)]
        assert all(map(torch.equal, *after))


def test_it_goes_back_so_often_and_no_more(tmp_path: Path) -> None:
    cfg = replace(JUMPING, spike_rollbacks=1)
    message = r"^train\.lr=0\.001: twist: the loss jumps to .* after 1 returns to a checkpoint \(train\.spike_rollbacks\)"
    with pytest.raises(NotFinite, match=message):
        train(masked, cfg, {12: 50.0, 14: 50.0}, tmp_path)


def test_off_unless_asked_for(tmp_path: Path) -> None:
    result, _ = train(masked, replace(JUMPING, spike_factor=None), {12: 50.0}, tmp_path)
    assert result.rollbacks == []
    assert len(result.losses) == 18
    assert TrainConfig().spike_factor is None
    assert TrainConfig().max_bad_steps == 3
    with pytest.raises(ValueError, match=r"^train\.spike_factor=2\.0: needs checkpoints to go back to"):
        TrainConfig(spike_factor=2.0, checkpoint_every=0)
    with pytest.raises(ValueError, match=r"^train\.spike_factor=1\.0: must be above 1"):
        TrainConfig(spike_factor=1.0)


@pytest.mark.launcher
def test_a_nan_of_one_rank_is_seen_by_all_in_the_same_step(world) -> None:
    """ZeRO-3 with clipping, FSDP2 without; the rank is named though every rank's loss is finite."""
    for report in world(2).reports:
        for backend in ("zero3", "fsdp2"):
            assert report["spoilt"][backend] == {
                "skipped": [4],
                "ranks": [[1]],
                "kept": True,
                "went_on": True,
            }


def test_weights_that_are_broken_already_end_it_at_once(tmp_path: Path) -> None:
    """No later step can be better than one whose weights are infinite."""
    cfg = replace(CONFIG, lr=1e38, warmup_steps=0, checkpoint_every=100)
    with pytest.raises(NotFinite, match=r"and so are weights or moments by now.* at step 2 of 9"):
        train(dense, cfg, {}, tmp_path)
