"""Checkpoints that are written beside training: what they hold, when they are there, and where their errors come up."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint.test_masked import assert_equal, make, step
from engine.cases import CASES
from engine.resuming import CONFIG, STEPS, dropout_model, make_batches
from full_disk import full_disk

from trace_dist import shard
from trace_dist.checkpoint import Background, background, latest_checkpoint, load_checkpoint, save_checkpoint
from trace_dist.config import StateDtype, TrainConfig
from trace_dist.run_folder import RunFolder
from trace_dist.train.learner import DenseLearner, Learner, MaskedLearner
from trace_dist.train.loop import MetricLog, TrainResult, train_steps
from trace_dist.train.task import Checkpoints, train_learner
from trace_dist.utils.finite import NotFinite


@pytest.fixture
def writer() -> Iterator[Background]:
    writer = Background()
    yield writer
    writer.close()


def held(writer: Background) -> Event:
    """Keeps the thread busy until the event is set, so that what is saved now waits for it."""
    gate = Event()
    writer._thread.submit(gate.wait)
    return gate


@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
def test_training_goes_on_and_the_file_has_what_was_there(
    tmp_path: Path, writer: Background, state_dtype: StateDtype
) -> None:
    optimizer, same, other = (make(state_dtype=state_dtype) for _ in range(3))
    step(optimizer, 2), step(same, 2)
    gate, state = held(writer), {"losses": [1.0]}
    folder = save_checkpoint(tmp_path, 2, optimizer, state, write=writer.save)
    step(optimizer, 2)
    state["losses"].append(2.0)
    torch.rand(3)
    writer.attend()
    assert not folder.exists()
    assert latest_checkpoint(tmp_path) is None
    gate.set()
    writer.finish()
    assert latest_checkpoint(tmp_path) == folder
    manifest = load_checkpoint(folder, other)
    assert manifest["state"] == {"losses": [1.0]}
    assert_equal(other, same)
    # one that training waits for has the same bytes
    aside = save_checkpoint(tmp_path / "waits", 2, other, {"losses": [1.0]})
    for file in ("rank-00000.safetensors", "mask.safetensors"):
        assert (aside / file).read_bytes() == (folder / file).read_bytes()


def test_the_next_one_waits_for_the_one_before(
    tmp_path: Path, writer: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, gate = make(), held(writer)

    def opening(works: list) -> object:
        gate.set()
        return wait(works)

    monkeypatch.setattr(background, "wait", opening)
    first = save_checkpoint(tmp_path, 1, optimizer, {}, write=writer.save)
    assert not first.exists()
    step(optimizer)
    second = save_checkpoint(tmp_path, 2, optimizer, {}, write=writer.save)
    assert first.exists()
    writer.finish()
    assert sorted(tmp_path.iterdir()) == [first, second]
    writer.finish()  # nothing is on its way


def test_an_error_comes_up_before_the_next_step_and_nothing_is_lost(
    tmp_path: Path, writer: Background
) -> None:
    optimizer = make()
    first = save_checkpoint(tmp_path, 1, optimizer, {}, write=writer.save)
    writer.finish()
    gate = held(writer)
    save_checkpoint(tmp_path, 2, optimizer, {}, write=writer.save)
    with full_disk():
        gate.set()
        wait([writer._work])
    with pytest.raises(ValueError, match=r"cannot be written \(.*; check permissions and free space"):
        writer.attend()
    assert list(tmp_path.iterdir()) == [first]
    writer.attend()  # it is said once
    third = save_checkpoint(tmp_path, 3, optimizer, {}, write=writer.save)
    writer.finish()
    assert sorted(tmp_path.iterdir()) == [first, third]


@pytest.mark.parametrize("part", ["values", "exp_avg"])
def test_what_is_not_finite_replaces_nothing(tmp_path: Path, writer: Background, part: str) -> None:
    optimizer = make()
    step(optimizer)
    first = save_checkpoint(tmp_path, 1, optimizer, {})
    support, state = optimizer.compact()[0]
    broken = {"values": optimizer.model.local(support.name), **state}[part]
    broken.fill_(float("nan"))
    save_checkpoint(tmp_path, 2, optimizer, {}, write=writer.save)
    with pytest.raises(ValueError, match=f"checkpoint at step 2: {part} of .* is not finite, and nothing"):
        writer.finish()
    assert list(tmp_path.iterdir()) == [first]


def test_host_memory_is_used_again(tmp_path: Path, writer: Background) -> None:
    optimizer = make()
    save_checkpoint(tmp_path, 1, optimizer, {}, write=writer.save)
    places = {name: buffer.data_ptr() for name, buffer in writer._buffers.items()}
    step(optimizer)
    folder = save_checkpoint(tmp_path, 2, optimizer, {}, write=writer.save)
    writer.finish()
    assert {name: buffer.data_ptr() for name, buffer in writer._buffers.items()} == places
    other = make()
    load_checkpoint(folder, other)
    assert_equal(other, optimizer)


# ---- in training


def learner_of(kind: str, cfg: TrainConfig) -> Learner:
    """With dropout, of the same weights each time; the generator is at the same place."""
    torch.manual_seed(1)
    case, module = CASES["gpt2-conv1d"], dropout_model()
    if kind == "dense":
        return DenseLearner(module, module.parameters(), cfg)
    model = shard(module, "single")
    return MaskedLearner(model, case.mask(model), cfg)


def trained(kind: str, root: Path, cfg: TrainConfig) -> tuple[TrainResult, dict[str, bytes]]:
    """What a training measured, and the tensors in its checkpoints."""
    result = train_learner(
        learner_of(kind, cfg), make_batches(), cfg, STEPS, description="t", checkpoints=root
    )
    return result, {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("rank-*.safetensors")}


@pytest.mark.parametrize("kind", ["masked", "dense"])
def test_a_training_that_does_not_wait_has_the_curve_and_the_checkpoints_of_one_that_does(
    tmp_path: Path, kind: str
) -> None:
    cfg = replace(CONFIG, checkpoint_every=2, checkpoint_keep=3)
    (waits, kept), (goes_on, also_kept) = (
        trained(kind, tmp_path / str(beside), replace(cfg, checkpoint_async=beside))
        for beside in (False, True)
    )
    assert goes_on.losses == waits.losses
    assert [name.split("/")[0] for name in sorted(kept)] == [f"step-0000000{n}" for n in (4, 6, 8)]
    assert also_kept == kept


@pytest.mark.parametrize("kind", ["masked", "dense"])
def test_any_step_is_a_place_to_go_on_from(tmp_path: Path, kind: str) -> None:
    """Batches of 7 out of 11 examples, in micro-batches of 2: each step is at another place of the data."""
    cfg = replace(CONFIG, checkpoint_every=1, checkpoint_keep=STEPS)
    whole, kept = trained(kind, tmp_path, cfg)
    assert len(kept) == STEPS
    last = f"step-{STEPS:08d}/rank-00000.safetensors"
    for number in range(1, STEPS):
        root = tmp_path / f"from-{number}"
        root.mkdir()
        (tmp_path / f"step-{number:08d}").rename(root / f"step-{number:08d}")
        result, found = trained(kind, root, cfg)
        assert (result.losses, result.grad_norms) == (whole.losses, whole.grad_norms)
        assert found[last] == kept[last]


@pytest.mark.parametrize("ending", ["the next step", "the end"])
def test_an_error_ends_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Of the checkpoint after step 3: before step 5 where it comes up in step 4, and never later than the end."""
    cfg = replace(CONFIG, log_every=1)
    steps = 5 if ending == "the next step" else 3
    learner, batches, root = learner_of("masked", cfg), make_batches(), tmp_path / "kept"
    checkpoints, done = Checkpoints(root, cfg, learner, batches), []
    writer = checkpoints._background
    assert writer is not None

    def after(step: int, values: dict[str, float]) -> None:
        done.append(step)
        if step == 4:
            gate.set()
            wait([writer._work])

    monkeypatch.setattr(MetricLog, "write", lambda self, step, values, *_: after(step, values))
    gate = held(writer) if ending == "the next step" else Event()
    log = MetricLog(RunFolder.of(tmp_path), "t")
    # A file where the older folder of the step goes: it cannot be replaced.
    (root / "step-00000003").mkdir(parents=True)
    (root / ".step-00000003.replaced").touch()
    with pytest.raises(ValueError, match=r"step-00000003: cannot be written \("), checkpoints:
        train_steps(learner, batches, cfg, steps, log=log, keeper=checkpoints)
    assert done == [1, 2, 3, 4][: steps if steps == 3 else 4]


def test_what_is_being_written_is_kept_when_training_diverges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is of a step before, when all was well."""
    cfg = replace(CONFIG, log_every=1)
    learner, batches = learner_of("masked", cfg), make_batches()
    checkpoints = Checkpoints(tmp_path / "kept", cfg, learner, batches)
    assert checkpoints._background is not None
    gate = held(checkpoints._background)

    def after(step: int) -> None:
        if step == 4:
            next(learner.module.parameters()).data.fill_(float("nan"))
            gate.set()

    monkeypatch.setattr(MetricLog, "write", lambda self, step, *_: after(step))
    log = MetricLog(RunFolder.of(tmp_path), "t")
    with pytest.raises(NotFinite), checkpoints:
        train_steps(learner, batches, cfg, STEPS, log=log, keeper=checkpoints)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step-00000003"]


def test_copies_are_awaited_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the caller's may lie on a GPU that is not the current one, whose stream has copied nothing."""
    awaited: list[object] = []

    def current_stream(device: object = None) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: awaited.append(device))

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    second = torch.device("cuda", 1)
    there: list[Any] = [SimpleNamespace(device=second, is_cuda=True)] * 2
    background._await_copies([torch.zeros(1), *there])
    assert awaited == [second]
