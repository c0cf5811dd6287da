"""The race for a learning rate: the best rate wins, nothing of the race is left, and a run that was cut does not race again."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from continual.small import METHODS, TASKS, make_config, result

from trace_dist.config import ContinualConfig, RaceConfig, RunConfig
from trace_dist.continual import driver
from trace_dist.continual import race as races
from trace_dist.continual.driver import check_methods, run_continual
from trace_dist.continual.methods.base import Method
from trace_dist.continual.race import MOST_EXTENSIONS, Race, held_race, race_rates, split
from trace_dist.continual.setting import Setting
from trace_dist.masks import Mask, UnitLayout
from trace_dist.stages import train as training
from trace_dist.train.schedule import make_schedule
from trace_dist.utils.finite import NotFinite
from trace_dist.utils.sealed import read_record, write_record

GRID = [1e-3, 1e-2, 1e-1]
STEPS = 8


def racing(cfg: RunConfig, *methods: str) -> RunConfig:
    """A run whose methods all race."""
    options = {name: {**cfg.continual.options.get(name, {}), "lr": "auto"} for name in methods}
    race_of = RaceConfig(GRID, steps=STEPS, heldout=20)
    return replace(cfg, continual=ContinualConfig(list(methods), options), race=race_of)


def with_teachers(cfg: RunConfig, folder: Path) -> RunConfig:
    """The run with the bank that ``consolidated`` is taught by."""
    if cfg.continual.methods == ["consolidated"]:
        shutil.copytree(folder / "whole" / "bank", Path(cfg.run_dir) / "bank")
    return cfg


def method_of(cfg: RunConfig) -> Method:
    (entry,) = check_methods(cfg)
    return entry.kind(entry.name, Setting.load(cfg), entry.options)


def weights(method: Method) -> dict[str, torch.Tensor]:
    """Copies of all that a method trains on, and of what it was made from."""
    if method.masked:
        return {name: value.clone() for name, value in method.setting.model.full_state_dict().items()}
    return {name: value.clone() for name, value in method.module.state_dict().items()}


def descend(lr: float, curvature: float = 20.0, steps: int = 12) -> float:
    """Gradient descent on ``curvature / 2 * x ** 2`` from 1: best at 1 / curvature, diverging from 2 / curvature on."""
    return curvature / 2 * (1 - lr * curvature) ** (2 * steps)


@pytest.mark.parametrize(
    ("grid", "raced"),
    [
        ([1e-2, 5e-2, 9e-2], [1e-2, 5e-2, 9e-2]),
        # given in any order
        ([9e-2, 1e-2, 5e-2], [1e-2, 5e-2, 9e-2]),
        # the winner at an edge: one step beyond, in that direction alone
        ([5e-3, 1.5e-2], [5e-3, 1.5e-2, 4.5e-2, 0.135]),
        ([5e-2, 7e-2], [0.0357, 5e-2, 7e-2]),
        # four steps at most
        ([1e-5, 3e-5], [1e-5, 3e-5, 9e-5, 2.7e-4, 8.1e-4, 2.43e-3]),
        ([5e-1, 1.5e0], [0.0186, 0.0558, 0.167, 0.5, 1.5]),
    ],
)
def test_the_best_rate_of_a_parabola_wins(grid: list[float], raced: list[float]) -> None:
    asked = []

    def measure(lr: float) -> float:
        asked.append(lr)
        return descend(lr)

    found = race_rates(grid, measure, lambda: descend(0.0))
    assert found.lr == pytest.approx(min(raced, key=descend))
    assert list(found.losses) == pytest.approx(raced)
    assert len(asked) == len(raced) <= len(grid) + MOST_EXTENSIONS


def test_a_rate_that_learns_nothing_is_not_level_with_one_that_learns_little() -> None:
    """Where a short training wins 4 % of the loss, the base itself lies within 5 % of the best rate."""
    losses, asked = {1e-4: 2.499, 1e-3: 2.49, 3e-3: 2.46, 1e-2: 2.40, 3e-2: 2.45}, []

    def untrained() -> float:
        asked.append(1)
        return 2.5

    found = race_rates([1e-3, 3e-3, 1e-2, 3e-2], losses.__getitem__, untrained)
    assert (found.lr, found.start, asked) == (1e-2, 2.5, [1])
    assert Race.from_json(found.to_json()) == found
    # What is level in what it wins still is; where the best stands alone, nothing is asked.
    near = {1e-3: 2.3, 3e-3: 2.005, 1e-2: 2.0, 3e-2: 2.2}
    assert race_rates([*near], near.__getitem__, untrained).lr == 3e-3
    alone = {1e-3: 2.3, 3e-3: 1.0, 1e-2: 2.0}
    assert race_rates([*alone], alone.__getitem__, untrained).start is None
    assert len(asked) == 2


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_rate_that_diverges_has_lost(lost: float) -> None:
    found = race_rates([1e-3, 3e-3, 1e-2], lambda lr: lost if lr > 2e-3 else 1 / lr)
    assert found.lr == 1e-3
    assert found.losses[1e-2] == math.inf
    assert found.to_json()[-1] == {"lr": 1e-2, "loss": None}
    assert Race.from_json(found.to_json()) == found


def test_where_all_diverge_lower_rates_race_before_it_is_an_error() -> None:
    assert race_rates([1e-2, 1e-1], lambda lr: math.nan if lr > 2e-4 else 1 - 1e3 * lr).lr == 1e-4
    with pytest.raises(
        ValueError,
        match=r"^race.grid=\[1.0, 3.0\]: training diverges at each of 0.0123, 0.037, 0.111, 0.333, 1, 3; lower",
    ):
        race_rates([1.0, 3.0], lambda lr: math.nan)


def test_of_rates_that_are_level_the_lowest_wins() -> None:
    """A short training bears higher rates than a long one."""
    assert Race({1e-3: 2.0, 1e-2: 1.0, 1e-1: 1.0}).lr == 1e-2
    assert Race({1e-3: 2.0, 1e-2: 1.049, 1e-1: 1.0}).lr == 1e-2
    assert Race({1e-3: 2.0, 1e-2: 1.051, 1e-1: 1.0}).lr == 1e-1
    assert Race({1e-3: 0.0, 1e-2: 0.0, 1e-1: math.inf}).lr == 1e-3


def test_heldout_examples_are_training_examples_that_no_rate_trains_on(fresh: RunConfig) -> None:
    setting = Setting.load(fresh)
    stream = setting.bench.tasks[0]
    part, heldout = split(stream, RaceConfig(heldout=20, steps=STEPS), fresh.seed)
    assert (part.steps, len(heldout.encoded)) == (STEPS, 20)
    key = lambda rows: sorted(map(tuple, rows["input_ids"]))  # noqa: E731 - tokens of rows, in an order of their own
    assert key(stream.encoded) == sorted(key(part.encoded) + key(heldout.encoded))
    few = split(stream, RaceConfig(heldout=10**6, steps=10**6), fresh.seed)
    assert len(few[1].encoded) == len(stream.encoded) // 5
    assert few[0].steps == stream.steps


@pytest.mark.parametrize("name", ["retrieved", "merged", "consolidated", "full", "lora"])
def test_a_race_leaves_nothing_behind(fresh: RunConfig, folder: Path, name: str) -> None:
    """Weights, random numbers and place in the data are as before, also after a rate that diverges; a sensible rate wins."""
    cfg = with_teachers(racing(fresh, name), folder)
    cfg = replace(cfg, race=replace(cfg.race, grid=[1e-7, 1e-2, 1e30]))
    method = method_of(cfg)
    method.score()
    before, state = weights(method), torch.get_rng_state()
    streams = method.setting.bench.tasks[:2]
    found = held_race(method.setting, name, streams, method.trial, method.continues)
    after = weights(method)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert found.lr == 1e-2
    assert found.losses[1e30] == math.inf
    # the race is kept: nothing trains a second time
    assert held_race(method.setting, name, streams, refuse) == found


@pytest.mark.parametrize("name", ["retrieved", "merged", "consolidated", "full", "lora"])
def test_a_race_that_wins_little_knows_where_it_started(
    fresh: RunConfig,
    folder: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And says that its winner lies at the edge."""
    monkeypatch.setattr(races, "MOST_EXTENSIONS", 0)
    monkeypatch.setattr(races.logger.parent, "propagate", True)
    cfg = with_teachers(racing(fresh, name), folder)
    method = method_of(replace(cfg, race=replace(cfg.race, grid=[1e-6, 1e-5], steps=3)))
    streams = method.setting.bench.tasks
    found = held_race(method.setting, name, streams, method.trial, method.continues)
    # what teachers say may lower no loss on the labels
    assert found.start is not None or name == "consolidated"
    assert found.start in (None, pytest.approx(found.losses[1e-6], abs=1e-3))
    assert "is at the edge of all rates that raced" in caplog.text
    assert held_race(method.setting, name, streams, refuse) == found


@pytest.mark.parametrize("name", ["retrieved", "merged", "consolidated", "full", "lora"])
def test_the_second_task_starts_as_it_will_in_the_run(fresh: RunConfig, folder: Path, name: str) -> None:
    """From the base where each task has a delta of its own, or the bank teaches; else from what the first one left."""
    method = method_of(with_teachers(racing(fresh, name), folder))
    method.score()
    base, starts = weights(method), []

    @contextmanager
    def watched(stream: Any, part: Any, lr: float) -> Iterator[Any]:
        starts.append(
            (stream.task.name, all(torch.equal(base[key], value) for key, value in weights(method).items()))
        )
        with method.trial(stream, part, lr) as learner:
            yield learner

    held_race(method.setting, name, method.setting.bench.tasks[:2], watched, method.continues)
    (first, second), each = TASKS[:2], starts[:2]
    assert each == [(first, True), (second, name in ("retrieved", "consolidated"))]
    assert all(from_base for task, from_base in starts if task == first)


def test_the_loss_is_the_mean_over_the_tasks(fresh: RunConfig) -> None:
    method = method_of(racing(fresh, "retrieved"))
    one, other, both = (
        held_race(method.setting, f"retrieved-{number}", streams, method.trial).losses
        for number, streams in enumerate(
            (method.setting.bench.tasks[i:j] for i, j in ((0, 1), (1, 2), (0, 2)))
        )
    )
    for lr in GRID:
        assert both[lr] == pytest.approx((one[lr] + other[lr]) / 2)


def refuse(*_: Any) -> Any:
    raise AssertionError("raced again")


def test_a_rate_that_won_trains_as_the_same_rate_given(fresh: RunConfig, folder: Path) -> None:
    """A run that raced is the run with the winner's rate, bit for bit, with the rates in its result."""
    run_continual(racing(fresh, "retrieved"))
    raced = result(fresh, "retrieved")
    assert {each["lr"] for each in raced["rates"]} >= set(GRID)
    assert raced["lr"] == min(raced["rates"], key=lambda each: each["loss"] or math.inf)["lr"]
    assert raced["lr_by_task"] == dict.fromkeys(TASKS, raced["lr"])
    given = replace(
        racing(fresh, "retrieved"),
        run_dir=f"{fresh.run_dir}-given",
        continual=ContinualConfig(["retrieved"], {"retrieved": {"lr": raced["lr"]}}),
    )
    shutil.copytree(folder / "probed", given.run_dir)
    run_continual(given)
    found = result(given, "retrieved")
    assert (found["losses"], found["R"]) == (raced["losses"], raced["R"])
    assert found["rates"] == []


def test_a_run_that_was_cut_does_not_race_again(fresh: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = racing(fresh, "full")
    kind = check_methods(cfg)[0].kind
    learn, trial, trials = kind.learn, kind.trial, []

    @contextmanager
    def counted(self: Any, stream: Any, part: Any, lr: float) -> Iterator[Any]:
        trials.append(lr)
        with trial(self, stream, part, lr) as learner:
            yield learner

    def cut(self: Any, stream: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "trial", counted)
    monkeypatch.setattr(kind, "learn", cut)
    with pytest.raises(KeyboardInterrupt):
        run_continual(cfg)
    number = len(trials)
    assert number >= len(GRID)
    monkeypatch.setattr(kind, "learn", learn)
    run_continual(cfg)
    assert len(trials) == number
    # each on two tasks, and the lowest on none where the loss before training was asked for
    raced = [each["lr"] for each in result(cfg, "full")["rates"]]
    assert sorted(2 * raced) == sorted(trials[: 2 * len(raced)])
    assert trials[2 * len(raced) :] in ([], 2 * [min(raced)])


def test_a_race_under_other_conditions_is_held_again(fresh: RunConfig) -> None:
    cfg = racing(fresh, "full")
    method = method_of(cfg)
    stream = method.setting.bench.tasks[0]

    @contextmanager
    def diverges(*_: Any) -> Iterator[Any]:
        raise NotFinite("the loss is nan")
        yield

    held_race(method.setting, "full", [stream], method.trial)
    other = replace(method.setting, cfg=replace(cfg, race=replace(cfg.race, steps=STEPS + 1)))
    with pytest.raises(ValueError, match="training diverges at each of"):
        held_race(other, "full", [stream], diverges)


def test_how_a_run_is_carried_out_holds_no_race_again(
    fresh: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a record of an earlier release, which held such fields too; what the trials depend on does."""
    cfg = racing(fresh, "full")
    setting, trials = Setting.load(cfg), []
    streams = setting.bench.tasks[:1]

    def measured(*_: Any) -> float:
        trials.append(1)
        return 1.0 / len(trials)

    monkeypatch.setattr("trace_dist.continual.race._loss_after", measured)
    trial: Any = lambda *_: None  # noqa: E731 - nothing is trained
    found = held_race(setting, "full", streams, trial, about={"options": {"replay": 0.1}})
    number = len(trials)
    train = replace(cfg.train, checkpoint_minutes=9.0, checkpoint_every=5, log_every=1, trackers=())
    other = replace(setting, cfg=replace(cfg, train=train, data=replace(cfg.data, num_proc=2)))
    assert held_race(other, "full", streams, trial, about={"options": {"replay": 0.1}}) == found
    path = cfg.folder.race("full")
    kept = read_record(path, "")
    kept["about"]["train"] |= {"checkpoint_minutes": 3.0, "max_bad_steps": 3}
    write_record(path, {key: kept[key] for key in ("about", "rates")})
    assert held_race(other, "full", streams, trial, about={"options": {"replay": 0.1}}) == found
    assert len(trials) == number
    held_race(other, "full", streams, trial, about={"options": {"replay": 0.2}})
    assert len(trials) > number


def test_a_task_that_is_trained_by_itself_races_on_its_own_mask(
    fresh: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` takes a mask file; the race that was held on another mask is not its."""
    cfg = replace(fresh, train=replace(fresh.train, lr="auto"), race=RaceConfig(GRID, steps=STEPS))
    setting, tried = Setting.load(cfg), []
    monkeypatch.setattr(training, "try_rate", lambda *_, **__: tried.append(1))
    monkeypatch.setattr("trace_dist.continual.race._loss_after", lambda *_: 1.0)
    layouts = {"w": UnitLayout((4, 4), 1)}
    numbers = []
    for entry in (1, 1, 2):
        mask = Mask({"w": torch.tensor([entry], dtype=torch.int32)}, layouts, "element")
        training._won(setting, setting.bench.tasks[0], mask)
        numbers.append(len(tried))
    assert 0 < numbers[0] == numbers[1] < numbers[2]


def test_a_stream_that_goes_on_keeps_its_race(fresh: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its later tasks are trained with the rate that won before the first one; the weights are no longer those that raced."""
    cfg = racing(fresh, "full")
    cfg = replace(cfg, race=replace(cfg.race, grid=GRID[:2], tasks=1))
    kind = check_methods(cfg)[0].kind
    learn = kind.learn

    def cut(self: Any, stream: Any) -> Any:
        if stream.task.name == TASKS[1]:
            raise KeyboardInterrupt
        return learn(self, stream)

    monkeypatch.setattr(kind, "learn", cut)
    with pytest.raises(KeyboardInterrupt):
        run_continual(cfg)
    path = cfg.folder.race("full")
    kept = read_record(path, "")
    monkeypatch.setattr(kind, "learn", learn)
    monkeypatch.setattr(kind, "trial", refuse)
    content = path.read_bytes()
    path.unlink()
    other = replace(cfg, race=replace(cfg.race, steps=STEPS + 1))
    with pytest.raises(
        ValueError, match=r"full/race\.json: is missing, and full has finished tasks .* begin anew"
    ):
        run_continual(other)
    path.write_bytes(content)
    run_continual(other)
    assert result(cfg, "full")["rates"] == kept["rates"]
    rates = result(cfg, "full")["lr_by_task"]
    assert rates[TASKS[1]] == rates[TASKS[0]]


class Silent(Method):
    """A method that has no trial."""

    label, colour, masked, on_ranks = "silent", "green", False, True


def test_a_method_without_a_trial_cannot_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = make_config(tmp_path, ["retrieved"])
    cfg = replace(cfg, train=replace(cfg.train, lr="auto"))
    assert [entry.name for entry in check_methods(cfg)] == ["retrieved"]
    monkeypatch.setattr(driver, "method_class", lambda name: Silent)
    with pytest.raises(
        ValueError, match=r"^continual.methods='retrieved': has no trial, so its learning rate cannot race"
    ):
        check_methods(cfg)


def test_every_method_of_the_package_races_where_nothing_else_is_said(tmp_path: Path) -> None:
    cfg = make_config(tmp_path, METHODS)
    cfg = replace(cfg, train=replace(cfg.train, lr="auto"), continual=ContinualConfig(list(METHODS)))
    assert all(entry.kind.races(entry.options, cfg) for entry in check_methods(cfg))
    number = replace(cfg, train=replace(cfg.train, lr=1e-3))
    assert not any(entry.kind.races(entry.options, number) for entry in check_methods(number))


@pytest.mark.parametrize("name", ["retrieved", "merged", "consolidated", "full", "lora"])
def test_a_race_is_the_beginning_of_the_whole_training(
    fresh: RunConfig, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps are few, and the rate falls over those that the method will train for."""
    method = method_of(with_teachers(racing(fresh, name), folder))
    method.score()
    schedules: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "trace_dist.train.task.make_schedule",
        lambda optimizer, cfg, steps, horizon=None: (
            schedules.append((steps, horizon or steps)) or make_schedule(optimizer, cfg, steps, horizon)
        ),
    )
    stream = method.setting.bench.tasks[0]
    few = replace(stream, steps=3 * STEPS)
    method.race = held_race(method.setting, name, [few], method.trial)
    races, schedules[:] = set(schedules), []
    method.learn(few)
    ((whole, _),) = schedules
    assert races == {(STEPS, whole)}
    assert whole > STEPS
