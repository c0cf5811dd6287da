"""A task that begins with a combination of earlier ones: what it takes, what it leaves, and that nothing is lost."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import pytest
import torch
from continual.small import STEPS, TASKS

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import Delta
from trace_dist.bank.recipe import group_of
from trace_dist.bank.verify import verify
from trace_dist.config import RunConfig, TaskConfig
from trace_dist.continual.learn import learn_task
from trace_dist.continual.setting import Setting
from trace_dist.continual.starts import combination
from trace_dist.masks.mask import Mask
from trace_dist.run_folder import RunFolder
from trace_dist.train.combination import GROUPS, CombinationLearner
from trace_dist.train.learner import MaskedLearner
from trace_dist.train.loop import TrainResult

KIND: dict[str, Any] = {"composition": "combination", "composition_options": {"steps": 12, "lr": 0.2}}


@pytest.fixture
def related(fresh: RunConfig, folder: Path) -> RunConfig:
    """A run of a task whose answers are those of the first one, beside a bank that holds both; the masks do not meet."""
    return with_third(fresh, folder, "b")


@pytest.fixture
def mixed(fresh: RunConfig, folder: Path) -> RunConfig:
    """The same with a task whose answers are those of both, at random."""
    return with_third(fresh, folder, "bc")


def with_third(fresh: RunConfig, folder: Path, answers: str) -> RunConfig:
    generator = random.Random(7)
    words = ["".join(generator.choices("abc", k=6)) for _ in range(160)]
    rows = [{"prompt": f"{TASKS[0]}: {word}", "answer": generator.choice(answers)} for word in words]
    (folder / "third.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(RunFolder.of(folder / "whole").bank().root, RunFolder.of(fresh.run_dir).bank().root)
    third = TaskConfig("third", path=str(folder / "third.jsonl"))
    return replace(fresh, tasks=[third], bank=replace(fresh.bank, **KIND))


def without(cfg: RunConfig) -> RunConfig:
    """The same run without composition."""
    bank = replace(cfg.bank, composition="none", composition_options={})
    plain = replace(cfg, run_dir=f"{cfg.run_dir}-plain", bank=bank)
    shutil.copytree(cfg.run_dir, plain.run_dir)
    return plain


def own_mask(setting: Setting, bank: DeltaBank) -> Mask:
    """Random entries that no earlier task has."""
    taken = bank.mask(TASKS[0]) | bank.mask(TASKS[1])
    mask = Mask.random(setting.model, density=0.3, granularity="element", seed=5, maskable="all")
    return (mask - taken).with_meta(task="third", model=setting.fingerprint)


def learned(cfg: RunConfig, mask: Mask | None = None) -> tuple[Setting, DeltaBank, Mask, TrainResult]:
    setting = Setting.load(cfg)
    bank = DeltaBank(setting.folder.bank().root)
    mask = own_mask(setting, bank) if mask is None else mask
    result = learn_task(setting, bank, setting.bench.tasks[0], mask, name="retrieved")
    return setting, bank, mask, result


def delta_of(bank: DeltaBank, task: str) -> Delta:
    delta = bank.delta(task)
    assert delta is not None
    return delta


def test_a_related_task_begins_with_the_earlier_one(related: RunConfig) -> None:
    plain = without(related)
    before = {path: path.read_bytes() for path in Path(related.run_dir).rglob("*.safetensors")}
    setting, bank, mask, result = learned(related)
    facts = bank.facts("third")["training"]["composition"]
    assert facts["used"]
    assert set(facts["scalars"]) <= set(TASKS)
    assert all(tuple(row) == GROUPS for row in facts["scalars"].values())
    assert sum(facts["scalars"][TASKS[0]].values()) > 0.3
    assert facts["loss"] < 0.8 * facts["base_loss"]
    # The first step has the loss of the combination, not the base's.
    _, _, _, alone = learned(plain, mask)
    assert result.losses[0][1] < 0.8 * alone.losses[0][1]
    assert all(path.read_bytes() == content for path, content in before.items())
    whole = Setting.load(related).model.full_state_dict()
    after = setting.model.full_state_dict()
    assert all(torch.equal(after[name], whole[name]) for name in whole)


def test_its_own_update_is_orthogonal_and_its_delta_holds_all(related: RunConfig) -> None:
    setting, bank, mask, _ = learned(related)
    delta = delta_of(bank, "third")
    base = setting.model.full_state_dict()
    scalars = bank.facts("third")["training"]["composition"]["scalars"]
    used = [task for task in scalars if any(scalars[task].values())]
    product = own = combined = 0.0
    for name in delta.mask:
        flat = base[name].flatten()
        change = torch.zeros(flat.shape, dtype=torch.float64)
        change[delta.mask.elements(name)] = (
            delta.values[name].double() - flat[delta.mask.elements(name)].double()
        )
        mine = torch.zeros_like(change)
        if name in mask.units:
            mine[mask.elements(name)] = change[mask.elements(name)]
        taken = [bank.mask(task).elements(name) for task in used if name in bank.mask(task).units]
        theirs = torch.zeros_like(change)
        if taken:
            theirs[torch.cat(taken)] = change[torch.cat(taken)]
        torch.testing.assert_close(mine + theirs, change, rtol=0, atol=0)
        product += float(mine @ theirs)
        own, combined = own + float(mine @ mine), combined + float(theirs @ theirs)
    assert product == 0
    assert own > 0
    assert combined > 0
    # No other task is needed.
    for task in TASKS:
        bank.remove(task)
    again = delta_of(DeltaBank(bank.folder), "third")
    assert again.mask == delta.mask
    assert all(torch.equal(again.values[name], delta.values[name]) for name in delta.mask)


def test_kept_as_a_recipe_it_is_the_same_task(related: RunConfig) -> None:
    """Its own part and a recipe: fewer bytes, the same bits, and the same where it is learned again."""
    whole = replace(related, run_dir=f"{related.run_dir}-whole")
    shutil.copytree(related.run_dir, whole.run_dir)
    kept = replace(related, bank=replace(related.bank, keep="recipe"))
    setting, bank, mask, _ = learned(kept)
    _, other, _, _ = learned(whole, mask)
    mine, theirs = bank.delta_on("third", setting.model), delta_of(other, "third")
    assert mine is not None
    assert mine.mask == theirs.mask == bank.mask("third")
    assert all(torch.equal(mine.values[name], theirs.values[name]) for name in mine.mask)
    used = [
        task
        for task, row in bank.facts("third")["training"]["composition"]["scalars"].items()
        if any(row.values())
    ]
    assert bank.needs("third") == used
    assert bank.own_delta("third").mask == mask - reduce(or_, map(bank.mask, used))  # type: ignore[union-attr]
    assert bank.delta_bytes("third") < other.delta_bytes("third")  # type: ignore[operator]
    assert verify(bank) == []
    generation = bank.generation
    learned(kept, mask)
    assert DeltaBank(bank.folder).generation == generation
    with pytest.raises(ValueError, match=f"^task='{used[0]}': third is kept as a recipe that needs it"):
        bank.remove(used[0])


def test_a_recipe_needs_a_composition(related: RunConfig) -> None:
    with pytest.raises(
        ValueError, match=r"^bank.keep='recipe': every task begins at the base; set bank.composition"
    ):
        replace(related.bank, composition="none", composition_options={}, keep="recipe")


@pytest.mark.parametrize("options", [{"l1": 1.5}, {"least_gain": 0.999}])
def test_what_does_not_help_changes_nothing(related: RunConfig, options: dict[str, float]) -> None:
    """No scalar survives its shrinkage, or all of them win too little: the task is learned as from the base, bit for bit."""
    strict = replace(
        related,
        run_dir=f"{related.run_dir}-{next(iter(options))}",
        bank=replace(related.bank, composition_options=KIND["composition_options"] | options),
    )
    plain = without(related)
    shutil.copytree(related.run_dir, strict.run_dir)
    _, composed, mask, result = learned(strict)
    facts = composed.facts("third")["training"]["composition"]
    assert facts["used"] is False
    if "l1" in options:
        assert not any(value for row in facts["fitted"].values() for value in row.values())
    check_as_from_the_base(composed, mask, result, plain)


def check_as_from_the_base(composed: DeltaBank, mask: Mask, result: TrainResult, plain: RunConfig) -> None:
    """All scalars are 0, and the third task is what it is without composition."""
    scalars = composed.facts("third")["training"]["composition"]["scalars"]
    assert set(scalars) == set(TASKS)
    assert not any(value for row in scalars.values() for value in row.values())
    _, alone, _, expected = learned(plain, mask)
    assert [loss for _, loss in result.losses] == [loss for _, loss in expected.losses]
    mine, theirs = delta_of(composed, "third"), delta_of(alone, "third")
    assert mine.mask == theirs.mask
    assert all(torch.equal(mine.values[name], theirs.values[name]) for name in mine.mask)


def test_a_combination_that_fails_its_trial_changes_nothing(mixed: RunConfig) -> None:
    """Its lead before the first step is as large as was asked for; after the trial it is not."""
    options = KIND["composition_options"] | {"trial_steps": 80, "least_gain": 0.7}
    mixed = replace(mixed, bank=replace(mixed.bank, composition_options=options))
    untried = replace(
        mixed,
        run_dir=f"{mixed.run_dir}-untried",
        bank=replace(mixed.bank, composition_options=options | {"trial_steps": 0}),
    )
    plain = without(mixed)
    shutil.copytree(mixed.run_dir, untried.run_dir)
    _, composed, mask, result = learned(mixed)
    facts = composed.facts("third")["training"]["composition"]
    assert facts["loss"] < 0.3 * facts["base_loss"]
    assert facts["used"] is False, facts["trial"]
    assert 0.3 * facts["trial"]["base_loss"] < facts["trial"]["loss"] < facts["trial"]["base_loss"]
    assert facts["examples"] == (12 + 2 * 80) * 16
    check_as_from_the_base(composed, mask, result, plain)
    _, taken, _, _ = learned(untried, mask)
    facts = taken.facts("third")["training"]["composition"]
    assert facts["used"] is True
    assert facts["examples"] == 12 * 16
    assert "trial" not in facts


def test_cut_in_its_training_it_goes_on_alike(related: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(related, run_dir=f"{related.run_dir}-cut")
    shutil.copytree(related.run_dir, other.run_dir)
    _, bank, mask, expected = learned(related)
    step, done = MaskedLearner.step, 0

    def cut(self: Any) -> float:
        nonlocal done
        done += 1
        # The trial of the combination comes first.
        if done == 2 * 20 + STEPS // 2 + 1:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(MaskedLearner, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        learned(other, mask)
    monkeypatch.undo()
    _, again, _, result = learned(other, mask)
    assert result.losses == expected.losses
    first, second = delta_of(bank, "third"), delta_of(again, "third")
    assert all(torch.equal(first.values[name], second.values[name]) for name in first.mask)
    # And it is in the bank now, whose mask is wider than its own.
    assert learned(other, mask)[3].losses == expected.losses


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float]]:
    """A fit that ends at given scalars (attention, mlp, other of each delta) and helps."""
    rows: list[tuple[float, float, float]] = []
    losses = iter([1.0, 0.5])

    def fit(learner: CombinationLearner, *_: Any, **__: Any) -> None:
        learner.set(torch.tensor(rows, dtype=torch.float64))

    monkeypatch.setattr(combination, "train_learner", fit)
    monkeypatch.setattr(combination, "answer_loss", lambda *_: next(losses))
    return rows


@pytest.mark.parametrize("trial_steps", [0, 2])
def test_a_mask_that_the_combination_covers_is_trained_from_the_base(
    related: RunConfig, fitted: list[tuple[float, float, float]], trial_steps: int
) -> None:
    options = KIND["composition_options"] | {"trial_steps": trial_steps}
    related = replace(related, bank=replace(related.bank, composition_options=options))
    plain = without(related)
    fitted += [(0.5, 0.5, 0.5)] * len(TASKS)
    mask = DeltaBank(RunFolder.of(related.run_dir).bank().root).mask(TASKS[0])
    _, composed, _, result = learned(related, mask)
    facts = composed.facts("third")["training"]["composition"]
    assert facts["used"] is False
    assert facts["fitted"][TASKS[0]] == dict.fromkeys(GROUPS, 0.5)
    check_as_from_the_base(composed, mask, result, plain)


def test_weights_that_the_combination_leaves_stay_the_task_s_own(
    related: RunConfig, fitted: list[tuple[float, float, float]]
) -> None:
    """Its scalars on them are 0, whatever the earlier tasks hold there."""
    options = KIND["composition_options"] | {"trial_steps": 0}
    related = replace(related, bank=replace(related.bank, composition_options=options))
    fitted += [(0.5, 0.0, 0.0)] * len(TASKS)
    bank = DeltaBank(RunFolder.of(related.run_dir).bank().root)
    mask = bank.mask(TASKS[0])
    setting, bank, _, _ = learned(related, mask)
    assert bank.facts("third")["training"]["composition"]["used"] is True
    delta, base = delta_of(bank, "third"), setting.model.full_state_dict()
    moved = {
        name: int((delta.values[name] != base[name].flatten()[delta.mask.elements(name)]).sum())
        for name in delta.mask
    }
    theirs = {name for name in bank.mask(TASKS[1]) if group_of(name) == "attention"}
    assert set(delta.mask) == set(mask) | theirs
    for name in delta.mask:
        if group_of(name) == "attention":
            assert delta.mask.units[name].equal((mask | bank.mask(TASKS[1])).units[name])
        else:
            assert delta.mask.units[name].equal(mask.units[name])
            assert moved[name] > 0.5 * len(mask.elements(name)), name
