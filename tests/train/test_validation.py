"""Looks at validation examples: the loss that they find, what is kept, when a training stops, and that a cut changes nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import CASES
from engine.looking import SCORES as FALLING
from engine.looking import look
from engine.resuming import CONFIG, PLAIN, STEPS, Cut, dropout_model, make_batches

from trace_dist import Delta, shard
from trace_dist.bank.delta import extract_delta
from trace_dist.config import TrainConfig
from trace_dist.data.batches import Batches, Step
from trace_dist.train.learner import DenseLearner
from trace_dist.train.loop import TrainResult
from trace_dist.train.loss import forward_nll_sum
from trace_dist.train.task import train_learner, train_mask
from trace_dist.train.validation import Look, Validation, Validator, best_of

EVERY = 2
LOOKS = (2, 4, 6, 8, 9)
LOOKING = replace(CONFIG, eval_every=EVERY)


def examples(world: int = 1, rank: int = 0, micro: int = 3) -> Step:
    """Five examples as one global batch."""
    rows = make_batches()._datasets[0].select(range(5))
    return next(
        Batches(rows, batch_size=5, micro_batch_size=micro, seed=0, pad_id=0, rank=rank, world_size=world)
    )


class Scores:
    """A metric that says what it is told to, look by look, and remembers the values that the model then had."""

    def __init__(self, said: dict[int, float], values: Any) -> None:
        self._said, self._values = iter(sorted(said.items())), values
        self.seen: dict[int, Any] = {}

    def __call__(self) -> float:
        step, score = next(self._said)
        self.seen[step] = self._values()
        return score


def masked(
    cfg: TrainConfig,
    scores: dict[int, float],
    folder: Path | None = None,
    last: int = STEPS,
    case: str = "gpt2-conv1d",
    seed: int = 1,
) -> tuple[TrainResult | None, dict[str, torch.Tensor], Scores]:
    """Masked training with dropout; the delta that it leaves, and those at its looks. None where it was cut."""
    torch.manual_seed(seed)
    model = shard(dropout_model() if case == "gpt2-conv1d" else CASES[case].model(), "single")
    mask = CASES[case].mask(model)
    metric = Scores(scores, lambda: extract_delta(model, mask, "t").values)
    validation = Validation(examples(), metric if scores else None)
    try:
        result, _ = train_mask(
            model,
            mask,
            make_batches(last),
            cfg,
            STEPS,
            description="t",
            checkpoints=folder,
            validation=validation,
        )
    except Cut:
        return None, {}, metric
    return result, dict(extract_delta(model, mask, "t").values), metric


def dense(cfg: TrainConfig, scores: dict[int, float], folder: Path, last: int = STEPS) -> Any:
    """The same of a whole model."""
    torch.manual_seed(1)
    module = dropout_model()
    learner = DenseLearner(module, module.parameters(), cfg)

    def values() -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    metric = Scores(scores, values)
    try:
        result = train_learner(
            learner, make_batches(last), cfg, STEPS, description="t", checkpoints=folder,
            validation=Validation(examples(), metric),
        )  # fmt: skip
    except Cut:
        return None, {}, metric
    return result, values(), metric


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_is_the_mean_over_all_answer_tokens_whatever_the_ranks_and_micro_batches() -> None:
    torch.manual_seed(0)
    model = PLAIN.model().eval()
    whole = make_batches()._datasets[0].select(range(5))
    total, tokens = 0.0, 0
    for row in whole:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            total += float(forward_nll_sum(model, inputs, labels))
        tokens += row["num_answer_tokens"]

    def part(step: Step) -> float:
        found = 0.0
        for micro in step.micro_batches:
            inputs = dict(micro)
            labels = inputs.pop("labels")
            with torch.no_grad():
                found += float(forward_nll_sum(model, inputs, labels, 1 / step.num_answer_tokens))
        return found

    for world in (1, 2, 3):
        found = sum(part(examples(world, rank, micro=2)) for rank in range(world))
        assert found == pytest.approx(total / tokens, rel=1e-6)


@pytest.mark.parametrize("train", [masked, dense])
def test_what_is_left_is_the_best_look_bit_for_bit_and_a_cut_changes_nothing(
    train: Any, tmp_path: Path
) -> None:
    cfg = replace(LOOKING, eval_by="metric")
    result, left, metric = train(cfg, FALLING, tmp_path / "whole")
    assert [look.step for look in result.looks] == list(LOOKS)
    assert [look.score for look in result.looks] == list(FALLING.values())
    assert result.kept_step == 4
    assert same(left, metric.seen[4])
    assert not same(left, metric.seen[9])
    # cut after step 7: the newest checkpoint is of step 6, and the best look lies before it
    assert train(cfg, FALLING, tmp_path / "cut", last=7)[0] is None
    again, found, _ = train(cfg, {8: 50.0, 9: 40.0}, tmp_path / "cut")
    assert (again.looks, again.kept_step, again.losses) == (result.looks, 4, result.losses)
    assert same(found, left)
    # started again when it is done: nothing is trained, nothing looked at
    once_more, found, _ = train(cfg, {0: 0.0}, tmp_path / "cut")
    assert (once_more.looks, once_more.kept_step) == (result.looks, 4)
    assert same(found, left)


def test_the_last_values_are_left_where_they_are_to_be_kept() -> None:
    result, left, metric = masked(replace(LOOKING, eval_by="metric", keep="last"), FALLING)
    assert result is not None
    assert result.kept_step == STEPS
    assert same(left, metric.seen[STEPS])


def test_looks_change_nothing_of_the_training() -> None:
    """Its curve, with dropout, and its last values, bit for bit."""
    plain, left, _ = masked(CONFIG, {})
    looked, found, _ = masked(replace(LOOKING, keep="last"), {})
    assert plain is not None
    assert looked is not None
    assert looked.losses == plain.losses
    assert looked.grad_norms == plain.grad_norms
    assert same(found, left)
    assert plain.looks == []
    assert "looks" not in plain.to_json()
    assert plain.kept_step is None


def test_patience_stops_a_training_at_the_same_step_with_or_without_a_cut(tmp_path: Path) -> None:
    cfg = replace(LOOKING, eval_by="metric", patience=2, checkpoint_every=4)
    result, left, metric = masked(cfg, FALLING, tmp_path / "whole")
    assert result is not None
    assert [look.step for look in result.looks] == [2, 4, 6, 8]
    assert [step for step, _ in result.losses] == list(range(1, 9))
    assert result.kept_step == 4
    assert same(left, metric.seen[4])
    assert masked(cfg, FALLING, tmp_path / "cut", last=5)[0] is None
    continued, found, _ = masked(cfg, {6: 59.0, 8: 50.0}, tmp_path / "cut", seed=2)
    assert continued is not None
    assert continued.looks == result.looks
    assert continued.losses == result.losses
    assert same(found, left)
    # the checkpoint is of the step at which it stopped
    ended, found, metric = masked(cfg, {}, tmp_path / "cut", seed=3)
    assert ended is not None
    assert ended.losses == result.losses
    assert same(found, left)


def test_a_master_copy_comes_back_with_the_weights() -> None:
    """In bf16 the delta is that of the look, since the master is rounded as it was."""
    result, left, metric = masked(replace(LOOKING, eval_by="metric"), FALLING, case="bf16")
    assert result is not None
    assert result.kept_step == 4
    assert same(left, metric.seen[4])


@pytest.mark.parametrize(
    ("patience", "scores", "over"),
    [
        (None, [3, 2, 1], False),
        (2, [1, 2, 2], False),
        (2, [1, 2, 2, 2], True),
        (1, [2, 1], True),
        (1, [1], False),
    ],
)
def test_patience_counts_looks_since_the_best(patience: int | None, scores: list[float], over: bool) -> None:
    looks = [Look(step, 1.0, float(score)) for step, score in enumerate(scores)]
    cfg = replace(LOOKING, eval_by="metric", patience=patience)
    assert Validator(Validation(examples()), cfg, STEPS).is_over(looks) == over


def test_the_best_look() -> None:
    assert best_of([Look(1, 2.0), Look(2, 1.0), Look(3, 1.0)]).step == 2
    assert best_of([Look(1, 1.0, 50.0), Look(2, 3.0, 60.0), Look(3, 2.0, 60.0)]).step == 3


def test_a_checkpoint_without_the_best_values_is_refused(tmp_path: Path) -> None:
    cfg = replace(LOOKING, eval_by="metric", keep="last")
    assert masked(cfg, FALLING, tmp_path, last=7)[0] is None
    with pytest.raises(
        ValueError, match=r"^train\.keep='best': the checkpoint has not kept the values of step 4"
    ):
        masked(replace(cfg, keep="best"), {}, tmp_path)


def test_a_checkpoint_whose_best_values_are_damaged_is_passed_over(tmp_path: Path) -> None:
    """They are covered by the checksums: training begins anew and ends the same."""
    cfg = replace(LOOKING, eval_by="metric", checkpoint_every=6)
    expected, left, _ = masked(cfg, FALLING)
    assert masked(cfg, FALLING, tmp_path, last=7)[0] is None
    path = tmp_path / "step-00000006" / "rank-00000.safetensors"
    content = path.read_bytes()
    assert b"/best" in content
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result, found, _ = masked(cfg, FALLING, tmp_path)
    assert result is not None
    assert expected is not None
    assert result.looks == expected.looks
    assert same(found, left)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_every": -1}, "train.eval_every=-1: must be at least 0"),
        ({"eval_every": 5, "patience": 0}, "train.patience=0: must be at least 1"),
        (
            {"patience": 3},
            "train.patience=3: says something of validation, but train.eval_every is 0; set train.eval_every",
        ),
        ({"eval_by": "metric"}, "train.eval_by='metric': says something of validation"),
        ({"keep": "last"}, "train.keep='last': says something of validation"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        TrainConfig(**options)


def test_a_validation_loss_that_is_none_stops_the_training() -> None:
    """It is so in evaluation mode alone: training does not see it."""
    model = shard(PLAIN.model(), "single")

    def spoil(module: torch.nn.Module, _: Any, output: Any) -> None:
        if not module.training:
            output.logits.fill_(float("nan"))

    model.module.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"the validation loss is nan at step 2 of 9; lower train\.lr"):
        train_mask(
            model, PLAIN.mask(model), make_batches(), LOOKING, STEPS, description="t",
            validation=Validation(examples()),
        )  # fmt: skip


@pytest.mark.launcher
def test_two_ranks_look_stop_and_keep_as_one_process_does(world: Any, tmp_path: Path) -> None:
    """ZeRO-3 and FSDP2, with packed rows; and a single process goes on from the checkpoint of two ranks."""
    alone = look(shard(PLAIN.model(), "single"), None)
    assert alone["packed"]
    for report in world(2).reports:
        for name, found in report["looking"].items():
            assert found["kept"] == 4, name
            assert found["is that of the look"], name
            assert found["packed"], name
            assert found["losses"] == pytest.approx(alone["losses"], rel=2e-6)
            assert [step for step, _ in found["looks"]] == list(LOOKS)
            assert [loss for _, loss in found["looks"]] == pytest.approx(
                [x for _, x in alone["looks"]], rel=2e-6
            )
        assert report["looking"]["continued"]["looks"] == report["looking"]["zero3"]["looks"]
    shutil.copytree(world(2).folder / "looking-cut", tmp_path / "cut")
    taken_over = look(shard(PLAIN.model(), "single"), tmp_path / "cut", {8: 50.0, 9: 40.0})
    kept = Delta.load(world(2).folder / "looking.safetensors")
    assert same(dict(taken_over["left"].values), dict(kept.values))
