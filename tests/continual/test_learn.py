"""A task is learned into a bank that holds tasks of other runs: they stay as they are, and can be retrieved."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from continual.small import TASKS, result

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.config import RunConfig
from trace_dist.continual import learn
from trace_dist.continual.driver import run_continual
from trace_dist.continual.learn import learn_task
from trace_dist.continual.scored import Scored
from trace_dist.continual.setting import Setting
from trace_dist.run_folder import RunFolder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture
def later(fresh: RunConfig, folder: Path) -> RunConfig:
    """A run of the second task alone, whose bank holds the first one already."""
    whole = RunFolder.of(folder / "whole").bank().root
    shutil.copytree(whole, RunFolder.of(fresh.run_dir).bank().root)
    DeltaBank(RunFolder.of(fresh.run_dir).bank().root).remove(TASKS[1])
    return replace(fresh, tasks=fresh.tasks[1:])


def test_a_later_run_adds_to_the_bank(later: RunConfig, folder: Path) -> None:
    """The files are those of one run that learned both; prompts of the new task go to it, some to the base or the old one."""
    bank = RunFolder.of(later.run_dir).bank().root
    before = files(bank)
    run_continual(later)
    assert DeltaBank(bank).tasks == [BASE, *TASKS]
    after = files(bank)
    assert {name: after[name] for name in before} == before
    assert after == files(RunFolder.of(folder / "whole").bank().root)
    retrieval = result(later, "retrieved")["retrieval"]
    assert retrieval["columns"] == [BASE, *TASKS]
    assert [sum(row) for row in retrieval["confusion"]] == [len(Setting.load(later).bench.tasks[0].task.test)]
    assert list(result(later, "retrieved")["delta_bytes"]) == [TASKS[1]]


def test_scores_with_deltas_of_other_runs(later: RunConfig, folder: Path) -> None:
    """A test prompt that retrieves an old task is answered with its delta, though the run knows no test set of that name."""
    setting = Setting.load(later)
    bank = DeltaBank(RunFolder.of(later.run_dir).bank().root)
    routes = setting.judge.route(setting.model, bank, setting.bench.tasks[0].task)
    assert set(routes) <= {BASE, TASKS[0]}
    scored = Scored()
    row = setting.judge.score_retrieved(setting.model, bank, scored)
    assert {name for name, sets in scored.examples.items() if sets.get(TASKS[1])} == set(routes)
    with bank.activated(setting.model, routes[0]):
        assert len(set(routes)) > 1 or setting.judge.score(setting.model.module).tasks == row.tasks


def test_a_task_in_the_bank_is_not_trained_again(
    fresh: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting.load(fresh)
    stream = setting.bench.tasks[0]
    bank = DeltaBank.create(RunFolder.of(fresh.run_dir).bank().root, setting.fingerprint, fresh.bank.layer)
    base = setting.model.full_state_dict()
    mask = setting.mask_for(stream)
    first = learn_task(setting, bank, stream, mask, name="retrieved")
    assert bank.facts(TASKS[0])["training"]["steps"] == stream.steps
    after = setting.model.full_state_dict()
    assert all(torch.equal(after[name], values) for name, values in base.items())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(learn, "train_mask", refuse)
    assert learn_task(setting, bank, stream, mask, name="retrieved") == first
    shutil.rmtree(RunFolder.of(fresh.run_dir).progress("retrieved"))
    assert learn_task(setting, bank, stream, mask, name="retrieved").losses == []
    # a whole run over it has a result too, without a curve
    monkeypatch.undo()
    run_continual(replace(fresh, tasks=fresh.tasks[:1]))
    assert result(fresh, "retrieved")["losses"] == {TASKS[0]: []}
    assert result(fresh, "retrieved")["step_ms"] == 0


def test_another_task_of_the_same_name_is_refused(later: RunConfig, folder: Path) -> None:
    bank = DeltaBank(RunFolder.of(later.run_dir).bank().root)
    other = replace(later.tasks[0], name=TASKS[0])
    setting = Setting.load(replace(later, tasks=[other]))
    stream = setting.bench.tasks[0]
    with pytest.raises(ValueError, match=f"tasks.name='{TASKS[0]}': .* with other examples; rename"):
        learn_task(setting, bank, stream, bank.mask(TASKS[0]), name="retrieved")
    with pytest.raises(ValueError, match="with other mask; rename"):
        learn_task(setting, bank, stream, setting.mask_for(stream, "random"), name="retrieved")


def test_masks_are_projected_for_the_task_that_is_learned_next(fresh: RunConfig) -> None:
    setting = Setting.load(fresh)
    folder = setting.folder
    setting.mask_for(setting.bench.tasks[1])
    assert folder.mask(TASKS[1]).is_file()
    assert folder.mask(TASKS[1], "random").is_file()
    assert not folder.mask(TASKS[0]).exists()


@pytest.mark.parametrize("kind", ["projected", "random"])
def test_masks_do_not_depend_on_the_order(fresh: RunConfig, folder: Path, kind: str) -> None:
    """Projected alone, or after another task was learned in the same process: the same bytes."""
    setting = Setting.load(fresh)
    setting.mask_for(setting.bench.tasks[1], kind)
    whole = RunFolder.of(folder / "whole")
    assert setting.folder.mask(TASKS[1], kind).read_bytes() == whole.mask(TASKS[1], kind).read_bytes()
