"""One set of weights that the bank teaches: it knows the tasks, reads no label, and asks each teacher for its own task."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from continual.small import STEPS, make_config, result

from trace_dist import Mask
from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import extract_delta
from trace_dist.config import RunConfig
from trace_dist.continual.driver import check_methods
from trace_dist.continual.methods.consolidated import Consolidated, _asked
from trace_dist.continual.prompts import prompts_of
from trace_dist.continual.setting import Setting
from trace_dist.data.encoding import IGNORE
from trace_dist.masks.ops import union
from trace_dist.run_folder import RunFolder


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


def test_tasks_whose_masks_are_of_several_kinds_are_folded(cfg: RunConfig) -> None:
    """As of runs with other settings of ``mask``, which one bank may hold."""
    setting = Setting.load(cfg)
    bank, name = DeltaBank(cfg.bank_of().root), cfg.tasks[0].name
    kept = bank.signature(name), bank.prompts(name), bank.facts(name)["training"]
    rows = Mask.random(setting.model, 0.05, "row").with_meta(model=setting.fingerprint)
    bank.remove(name)
    bank.add(kept[0], extract_delta(setting.model, rows, name), prompts=kept[1], facts=kept[2])
    method = method_of(cfg, steps=2)
    for stream in method.setting.bench.tasks:
        method.learn(stream)
    assert method.delta is not None
    assert method.delta.mask == union([method.bank.mask(task.name) for task in cfg.tasks])
    assert method.delta.mask.granularity == "element"


def test_no_label_is_read(cfg: RunConfig) -> None:
    """Other answers of the same length to the same prompts change nothing, and the bank keeps no answer."""
    method = method_of(cfg)
    stream = method.setting.bench.tasks[0]

    def spoiled(row: dict[str, Any]) -> dict[str, Any]:
        start = len(row["labels"]) - row["num_answer_tokens"]
        ids = [*row["input_ids"][:start], *([3] * row["num_answer_tokens"])]
        return {"input_ids": ids, "labels": [IGNORE] * start + ids[start:]}

    other = replace(stream, encoded=stream.encoded.map(spoiled))
    assert other.encoded["labels"][:] != stream.encoded["labels"][:]
    kept = method.bank.prompts(stream.task.name)
    assert kept is not None
    expected = prompts_of(method.setting, other, None)
    assert kept == {stream.task.name: expected}
    assert not any(pair.answer for pair in expected.pairs)


def test_each_task_is_answered_by_its_own_delta(cfg: RunConfig) -> None:
    """And general prompts by the base; running text is its own answer; the model is the base again."""
    method = method_of(cfg, prompts=9)
    model, bench = method.setting.model, method.setting.bench
    base = model.full_state_dict()
    said = method._said
    after = model.full_state_dict()
    assert all(torch.equal(after[name], value) for name, value in base.items())
    bank = DeltaBank(cfg.folder.bank().root)
    general = [("base", stream, found) for stream, found in zip(bench.general, said.general, strict=True)]
    own = [(stream.task.name, stream, said.tasks[stream.task.name]) for stream in bench.tasks]
    for teacher, stream, found in (*general, *own):
        with bank.activated(model, teacher):
            expected = method._taught(method._wanted(prompts_of(method.setting, stream, None)))
        assert found.to_dict() == expected.to_dict()
        assert len(expected) == 9
        if stream.task.metric == "bits_per_byte":
            assert expected["input_ids"][:] == stream.encoded.select(range(9))["input_ids"][:]


def test_what_the_bank_keeps_teaches_as_the_examples_do(cfg: RunConfig) -> None:
    """A bank without prompts is taught with those of this run's examples."""
    method = method_of(cfg, prompts=9)
    bare = DeltaBank.create(Path(cfg.run_dir) / "bare", method.bank.base, method.bank.layer)
    for name in method.bank.tasks:
        bare.add(method.bank.signature(name), method.bank.delta(name))
    other = method_of(replace(cfg, bank=replace(cfg.bank, path=str(bare.folder))), prompts=9)
    assert other.bank.prompts("one") is None
    assert {name: rows.to_dict() for name, rows in other._said.tasks.items()} == {
        name: rows.to_dict() for name, rows in method._said.tasks.items()
    }
    gone = replace(other.setting.cfg, tasks=cfg.tasks[1:])
    with pytest.raises(ValueError, match=r"task='one': the bank .* keeps no prompts of it"):
        method_of(gone).learn(method.setting.bench.tasks[1])


def test_a_batch_holds_tasks_by_their_steps_and_a_general_share(cfg: RunConfig) -> None:
    method = method_of(cfg, prompts=20, general=0.4)
    bench = method.setting.bench
    bench.tasks[:] = [
        replace(stream, steps=steps) for stream, steps in zip(bench.tasks, (30, 10), strict=True)
    ]
    batches = method._batches(bench.tasks[-1], method._said)
    batches._batch_size = 4000
    drawn = Counter(source for source, _ in map(batches._slot, range(4000)))
    # The newest task, the earlier one, two general sets.
    for source, expected in enumerate((0.15, 0.45, 0.2, 0.2)):
        assert drawn[source] / 4000 == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("options", "steps"), [({}, [16, 32]), ({"general": 0.0}, [12, 24]), ({"steps": 5}, [5, 5])]
)
def test_it_trains_as_long_as_the_tasks_did_together(
    cfg: RunConfig, options: dict[str, Any], steps: list[int]
) -> None:
    method = method_of(cfg, **{"steps": None, "general": 0.25, **options})
    assert [method._steps(stream) for stream in method.setting.bench.tasks] == steps
    assert STEPS == 12


def test_without_its_teachers_it_is_refused_before_any_work(folder: Path, cfg: RunConfig) -> None:
    for methods in (["consolidated"], ["consolidated", "retrieved"]):
        with pytest.raises(ValueError, match="does not hold one, two; name retrieved before it"):
            check_methods(make_config(folder, methods, "nowhere"))
    check_methods(make_config(folder, ["retrieved", "consolidated"], "nowhere"))
    check_methods(cfg)
    bank = DeltaBank(cfg.bank_of().root)
    kept, task = bank.signature("one"), bank.own_delta("one")
    assert task is not None
    bank.add(replace(kept, task="silent"), replace(task, task="silent"))
    with pytest.raises(ValueError, match=r"^task='silent': the bank .* keeps no prompts of it to teach with"):
        check_methods(cfg)
    bank.remove("silent")
    options = {"consolidated": {"general": 1.0}}
    with pytest.raises(ValueError, match=r"continual.options.consolidated.general=1.0: must lie in \[0, 1\)"):
        check_methods(replace(cfg, continual=replace(cfg.continual, options=options)))


def test_a_race_trains_on_nothing_that_was_held_out(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(cfg)
    stream = method.setting.bench.tasks[0]
    part = replace(stream, encoded=stream.encoded.select(range(10, 30)), steps=2)
    prompts = set(_asked(part.encoded))
    seen = []
    following = Consolidated._batches

    def watched(self: Consolidated, stream: Any, said: Any) -> Any:
        seen.extend(_asked(said.tasks[stream.task.name]))
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
        _ = method.bank


def test_a_bank_that_is_filled_too_late_is_refused(folder: Path) -> None:
    cfg = make_config(folder, ["retrieved", "consolidated"], "nowhere")
    cfg = replace(cfg, launch=replace(cfg.launch, single_process=["retrieved"]))
    with pytest.raises(
        ValueError, match=r"launch.single_process=\['retrieved'\]: retrieved would run after consolidated"
    ):
        check_methods(cfg)
