"""One set of weights that the bank teaches: it knows the tasks, reads no label, and asks each teacher for its own task."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from continual.small import STEPS, TASKS, make_config, result

from trace_dist.bank.bank import DeltaBank
from trace_dist.config import RunConfig
from trace_dist.continual.driver import check_methods
from trace_dist.continual.methods.consolidated import Consolidated, _prompts
from trace_dist.continual.setting import Setting
from trace_dist.data.encoding import IGNORE
from trace_dist.run_folder import RunFolder
from trace_dist.train.workbench import Stream


@pytest.fixture
def cfg(fresh: RunConfig, folder: Path) -> RunConfig:
    """A run of the method alone, beside a bank that is full."""
    shutil.copytree(folder / "whole" / "bank", RunFolder.of(fresh.run_dir).bank().root)
    return make_config(folder, ["consolidated"], Path(fresh.run_dir).name)


def method_of(cfg: RunConfig, **options: Any) -> Consolidated:
    (entry,) = check_methods(cfg)
    method = entry.kind(entry.name, Setting.load(cfg), replace(entry.options, **options))
    assert isinstance(method, Consolidated)
    return method


def test_it_knows_what_the_bank_knows(whole: RunConfig, cfg: RunConfig) -> None:
    bank = result(whole, "retrieved")["average_accuracy"]
    method = method_of(cfg, steps=120)
    base = sum(method.score().tasks) / 2
    first, last = method.setting.bench.tasks
    method.learn(first)
    assert method.delta is not None
    assert method.delta.mask == method.bank.mask(first.task.name)
    method.learn(last)
    assert method.delta.mask == method.bank.mask(first.task.name) | method.bank.mask(last.task.name)
    assert sum(method.score().tasks) / 2 > 0.9 * bank > base + 30


def test_no_label_is_read(cfg: RunConfig) -> None:
    """Other answers of the same length to the same prompts change nothing."""
    method = method_of(cfg)
    stream = method.setting.bench.tasks[0]

    def spoiled(row: dict[str, Any]) -> dict[str, Any]:
        start = len(row["labels"]) - row["num_answer_tokens"]
        ids = [*row["input_ids"][:start], *([3] * row["num_answer_tokens"])]
        return {"input_ids": ids, "labels": [IGNORE] * start + ids[start:]}

    other = replace(stream, encoded=stream.encoded.map(spoiled))
    assert other.encoded["labels"][:] != stream.encoded["labels"][:]
    assert method._taught(other).to_dict() == method._taught(stream).to_dict()


def test_each_task_is_answered_by_its_own_delta(cfg: RunConfig) -> None:
    """And general prompts by the base; running text is its own answer; the model is the base again."""
    method = method_of(cfg, prompts=9)
    model, bench = method.setting.model, method.setting.bench
    base = model.full_state_dict()
    method._ask()
    after = model.full_state_dict()
    assert all(torch.equal(after[name], value) for name, value in base.items())
    bank = DeltaBank(cfg.folder.bank().root)
    teachers = {
        **{stream.task.name: "base" for stream in bench.general},
        **dict(zip(TASKS, TASKS, strict=True)),
    }
    for stream in (*bench.general, *bench.tasks):
        name = stream.task.name
        with bank.activated(model, teachers[name]):
            expected = method._taught(stream)
        assert method._said[name].to_dict() == expected.to_dict()
        assert len(expected) == 9
        if stream.task.metric == "bits_per_byte":
            assert expected["input_ids"][:] == stream.encoded.select(range(9))["input_ids"][:]


def test_a_batch_holds_tasks_by_their_steps_and_a_general_share(cfg: RunConfig) -> None:
    method = method_of(cfg, prompts=20, general=0.4)
    bench = method.setting.bench
    streams = [replace(stream, steps=steps) for stream, steps in zip(bench.tasks, (30, 10), strict=True)]
    bench.tasks[:] = streams
    method._ask()
    batches = method._batches(streams[-1], method._said)
    batches._batch_size = 4000
    where = [streams[-1], *bench.general, streams[0]]
    drawn = Counter(source for source, _ in map(batches._slot, range(4000)))
    share = dict(zip(_order(method, streams, where), (0.15, 0.2, 0.2, 0.45), strict=True))
    for source, expected in share.items():
        assert drawn[source] / 4000 == pytest.approx(expected, abs=0.03)


def _order(method: Consolidated, streams: list[Stream], wanted: list[Stream]) -> list[int]:
    """Numbers of the batches' datasets: the newest task, the earlier ones, the general sets."""
    names = [
        streams[-1].task.name,
        streams[0].task.name,
        *(each.task.name for each in method.setting.bench.general),
    ]
    return [names.index(each.task.name) for each in wanted]


@pytest.mark.parametrize(
    ("options", "steps"), [({}, [32, 64]), ({"general": 0.0}, [24, 48]), ({"steps": 5}, [5, 5])]
)
def test_it_trains_as_long_as_the_tasks_did_together(
    cfg: RunConfig, options: dict[str, Any], steps: list[int]
) -> None:
    method = method_of(cfg, **{"steps": None, "general": 0.25, **options})
    assert [method._steps(stream) for stream in method.setting.bench.tasks] == steps
    assert STEPS == 24


def test_without_its_teachers_it_is_refused_before_any_work(folder: Path, cfg: RunConfig) -> None:
    for methods in (["consolidated"], ["consolidated", "retrieved"]):
        with pytest.raises(ValueError, match="does not hold one, two; name retrieved before it"):
            check_methods(make_config(folder, methods, "nowhere"))
    check_methods(make_config(folder, ["retrieved", "consolidated"], "nowhere"))
    check_methods(cfg)
    options = {"consolidated": {"general": 1.0}}
    with pytest.raises(ValueError, match=r"continual.options.consolidated.general=1.0: must lie in \[0, 1\)"):
        check_methods(replace(cfg, continual=replace(cfg.continual, options=options)))


def test_a_race_trains_on_nothing_that_was_held_out(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(cfg)
    stream = method.setting.bench.tasks[0]
    method._ask()
    part = replace(stream, encoded=stream.encoded.select(range(10, 30)), steps=2)
    prompts = set(_prompts(part.encoded))
    seen = []
    following = Consolidated._batches

    def watched(self: Consolidated, stream: Stream, said: Any) -> Any:
        seen.extend(_prompts(said[stream.task.name]))
        return following(self, stream, said)

    monkeypatch.setattr(Consolidated, "_batches", watched)
    with method.trial(stream, part, 1e-3):
        pass
    assert seen
    assert set(seen) <= prompts


def test_a_bank_of_another_base_is_refused(cfg: RunConfig) -> None:
    method = method_of(cfg)
    method.setting = replace(method.setting, fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"bank .*: made for the model with fingerprint"):
        method._ask()


def test_a_bank_that_is_filled_too_late_is_refused(folder: Path) -> None:
    cfg = make_config(folder, ["retrieved", "consolidated"], "nowhere")
    cfg = replace(cfg, launch=replace(cfg.launch, single_process=["retrieved"]))
    with pytest.raises(
        ValueError, match=r"launch.single_process=\['retrieved'\]: retrieved would run after consolidated"
    ):
        check_methods(cfg)
