"""Training that was cut off and continued equals training that was not, on the same and on other numbers of ranks."""

from __future__ import annotations

import functools
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.cases import CASES
from engine.resuming import CONFIG, PLAIN, STEPS, Resumed, dropout_model, make_batches, run

from trace_dist import shard
from trace_dist.run_folder import RunFolder
from trace_dist.train.cadence import Cadence
from trace_dist.train.loop import MetricLog
from trace_dist.train.task import train_mask
from trace_dist.utils.stopping import STOP, Stopped

LOSS_TOLERANCE = 2e-6


@functools.cache
def uninterrupted() -> Resumed:
    """One process, no checkpoints."""
    outcome = run(shard(PLAIN.model(), "single"), PLAIN, None)
    assert outcome is not None
    return outcome


def test_single_process_bit_for_bit(tmp_path: Path) -> None:
    """The whole curve, weights, masters and moments, with dropout; cut after step 5, continued from step 3 in a new model."""
    case = CASES["gpt2-conv1d"]

    def start(seed: int):
        torch.manual_seed(seed)
        return shard(dropout_model(), "single")

    whole = run(start(1), case, tmp_path / "whole")
    assert run(start(1), case, tmp_path / "cut", last=5) is None
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["step-00000003"]
    continued = run(start(2), case, tmp_path / "cut")
    assert whole is not None
    assert continued is not None
    assert continued.losses == whole.losses
    assert continued.norms == whole.norms
    assert all(torch.equal(continued.state[name], value) for name, value in whole.state.items())
    assert all(map(torch.equal, continued.optimizer, whole.optimizer))


def test_a_finished_training_started_again_repeats_its_result(tmp_path: Path) -> None:
    """The last checkpoint is of the last step, so nothing is left to train."""
    first = run(shard(PLAIN.model(), "single"), PLAIN, tmp_path)
    again = run(shard(PLAIN.model(), "single"), PLAIN, tmp_path)
    assert first is not None
    assert again is not None
    assert list(again.losses) == list(range(1, STEPS + 1))
    assert (again.losses, again.norms) == (first.losses, first.norms)
    assert all(torch.equal(again.state[name], value) for name, value in first.state.items())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 0),
        ({"checkpoint_minutes": 1e-9}, 1),
        ({"checkpoint_every": 0, "checkpoint_minutes": 1e-9}, 0),
    ],
    ids=["short", "by-time", "none"],
)
def test_checkpoints_by_time(
    options: dict[str, float], kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that ticks at every look: a checkpoint takes one tick, and the next one is due after nineteen."""
    ticks = itertools.count()
    monkeypatch.setattr(
        "trace_dist.train.task.Cadence", functools.partial(Cadence, clock=lambda: float(next(ticks)))
    )
    cfg = replace(CONFIG, **({"checkpoint_every": None} | options))
    model = shard(PLAIN.model(), "single")
    mask, batches = PLAIN.mask(model), make_batches()
    train_mask(model, mask, batches, cfg, STEPS, description="t", checkpoints=tmp_path)
    assert len(list(tmp_path.iterdir())) == kept


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path: Path) -> None:
    run(shard(PLAIN.model(), "single"), PLAIN, tmp_path)
    model = shard(PLAIN.model(), "single")
    with pytest.raises(
        ValueError, match=r"^train\.steps=4: .*step-00000009 has done 9 steps; raise it, or delete"
    ):
        train_mask(model, PLAIN.mask(model), make_batches(), CONFIG, 4, description="t", checkpoints=tmp_path)


def test_a_training_that_is_asked_to_stop_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops after the step that it is in, with a checkpoint that was not due; started again it stops no more."""
    stop = tmp_path / "stop"
    monkeypatch.setenv(STOP, str(stop))
    cfg = replace(CONFIG, checkpoint_every=100)
    whole, other = (shard(PLAIN.model(), "single") for _ in range(2))
    expected, _ = train_mask(whole, PLAIN.mask(whole), make_batches(), cfg, STEPS, description="t")

    def keep(step: int, values: dict[str, float]) -> None:
        if step == 4:
            stop.touch()

    monkeypatch.setattr(MetricLog, "write", lambda self, step, values: keep(step, values))
    log, kept = MetricLog(RunFolder.of(tmp_path), "t"), tmp_path / "kept"
    with pytest.raises(Stopped, match=rf"^t: step 5 of {STEPS} is done and kept"):
        train_mask(
            other, PLAIN.mask(other), make_batches(), replace(cfg, log_every=1), STEPS,
            description="t", checkpoints=kept, log=log,
        )  # fmt: skip
    assert [path.name for path in kept.iterdir()] == ["step-00000005"]
    stop.unlink()
    other = shard(PLAIN.model(), "single")
    result, _ = train_mask(
        other, PLAIN.mask(other), make_batches(), cfg, STEPS, description="t", checkpoints=kept
    )
    assert (result.losses, result.grad_norms) == (expected.losses, expected.grad_norms)


@pytest.mark.launcher
def test_two_ranks_bit_for_bit(world) -> None:
    for report in world(2).reports:
        found = report["cut_and_continue"]
        whole, continued = found["losses"]
        assert found["died"]
        assert len(whole) == STEPS
        assert continued == whole
        assert found["weights"]
        assert found["optimizer"]
        assert found["kept"] == [f"step-{STEPS - 3:08d}", f"step-{STEPS:08d}"]


@pytest.mark.launcher
def test_relay_over_two_then_one_then_three_ranks(world) -> None:
    """ZeRO-3 on 2 ranks to step 3, one process to step 6, ZeRO-3 on 3 ranks to the end."""
    expected = uninterrupted()
    losses = dict(world(3).section("take_over")["losses"])
    assert list(losses) == list(range(1, STEPS + 1))
    assert [losses[step] for step in losses] == pytest.approx(
        [expected.losses[s] for s in losses], rel=LOSS_TOLERANCE
    )
    for name, value in world(3).state("relay").items():
        torch.testing.assert_close(value, expected.state[name], rtol=0, atol=2e-5)


@pytest.mark.launcher
def test_relay_over_backends(world, tmp_path: Path) -> None:
    """ZeRO-3 to FSDP2, FSDP2 to ZeRO-3 and to one process: each from step 3 to the end."""
    expected, two = uninterrupted(), world(2)
    shutil.copytree(two.folder / "of-fsdp2", tmp_path / "to-single")
    last = run(shard(PLAIN.model(), "single"), PLAIN, tmp_path / "to-single")
    assert last is not None
    found = {
        **{name: (dict(losses), two.state(name)) for name, losses in two.section("other_backends").items()},
        "to-single": (last.losses, last.state),
    }
    assert len(found) == 3
    for losses, state in found.values():
        assert list(losses.values()) == pytest.approx(list(expected.losses.values()), rel=LOSS_TOLERANCE)
        for name, value in state.items():
            torch.testing.assert_close(value, expected.state[name], rtol=0, atol=2e-5)


@pytest.mark.launcher
def test_a_checkpoint_has_its_name_when_every_rank_has_written(world) -> None:
    """And an error of one rank's thread is raised on every rank, with nothing left of that checkpoint."""
    for report in world(2).reports:
        found = report["background"]
        assert not found["early"]
        assert found["whole"]
        ranks = [f"rank-0000{n}.safetensors" for n in (0, 1)]
        assert found["files"] == ["manifest.json", "mask.safetensors", *ranks]
        assert "exp_avg of" in found["error"]
        assert "is not finite, and nothing was written" in found["error"]
        assert found["left"] == ["step-00000001"]


@pytest.mark.launcher
def test_global_token_mean(world) -> None:
    """Uneven token counts over ranks and micro-batches: two ranks with micro-batches of 2 see the losses of one process."""
    found = world(2).section("hand_over")["losses"]
    expected = uninterrupted().losses
    assert found == pytest.approx([expected[step] for step in range(1, STEPS + 1)], rel=LOSS_TOLERANCE)


@pytest.mark.launcher
def test_a_fault_of_one_rank_is_an_error_on_every_rank(world) -> None:
    for report in world(2).reports:
        found = report["damaged"]
        assert "rank-00001.safetensors: missing or damaged; delete" in found["error"]
        assert found["latest"] == "None"
        assert "is not finite, and nothing was written" in found["unwritten"]
        assert found["unwritten"].endswith("False")
