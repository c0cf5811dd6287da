"""A bank is folded by a command of its own: all that lies in it, whatever the configuration names; anew when it has changed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from continual.small import TASKS, make_config, prepare

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import Delta
from trace_dist.config import RunConfig
from trace_dist.continual.driver import run_continual
from trace_dist.continual.methods.consolidated import Consolidated
from trace_dist.stages.consolidate import _begin, as_consolidated, run_consolidate
from trace_dist.utils.files import read_json, write_json


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of two tasks that has filled a bank."""
    folder = tmp_path_factory.mktemp("folded")
    prepare(folder)
    shutil.copytree(folder / "probed", folder / "run")
    cfg = make_config(folder, ["retrieved"])
    run_continual(cfg)
    return cfg


@pytest.fixture
def cfg(learned: RunConfig, tmp_path: Path) -> RunConfig:
    """A run of the second task alone, with a copy of that bank."""
    shutil.copytree(learned.bank_of().root, tmp_path / "bank")
    options = {"consolidated": {"steps": 6, "top": 4}}
    return replace(
        learned,
        run_dir=str(tmp_path / "later"),
        tasks=learned.tasks[1:],
        bank=replace(learned.bank, path=str(tmp_path / "bank"), layer=-1),
        continual=replace(learned.continual, options=options),
    )


def test_it_folds_tasks_that_the_configuration_does_not_name(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folding = as_consolidated(cfg)
    assert as_consolidated(folding) == folding
    scores = run_consolidate(folding)
    assert list(scores) == [TASKS[1], "plain", "text"]
    bank, product = DeltaBank(cfg.bank_of().root), folding.folder.product("consolidated")
    assert Delta.load(product).mask == bank.mask(TASKS[0]) | bank.mask(TASKS[1])
    found = read_json(product.with_suffix(".json"))
    assert found["tasks"] == list(TASKS)
    assert found["scores"] == scores
    assert set(found["prompts"]) == set(TASKS)
    learn = Consolidated.learn
    monkeypatch.delattr(Consolidated, "learn")
    # Nothing is trained again while the bank is as it was.
    assert run_consolidate(as_consolidated(cfg)) == scores
    # Nor with other fields that decide nothing, or beside a record of an earlier release, which held them.
    train = replace(cfg.train, checkpoint_minutes=9.0, log_every=1, max_bad_steps=1)
    carried = replace(cfg, train=train, data=replace(cfg.data, num_proc=2))
    assert run_consolidate(as_consolidated(carried)) == scores
    record = folding.folder.progress("consolidated") / "made_of.json"
    kept = read_json(record)
    write_json(record, kept | {"train": kept["train"] | {"checkpoint_minutes": 3.0, "trackers": []}})
    assert run_consolidate(as_consolidated(carried)) == scores
    monkeypatch.setattr(Consolidated, "learn", learn)
    bank.remove(TASKS[0])
    run_consolidate(as_consolidated(cfg))
    assert Delta.load(product).mask == bank.mask(TASKS[1])


def test_what_was_made_of_other_values_or_is_gone_is_made_anew(cfg: RunConfig) -> None:
    """A task that was learned again on the same mask, with the same rate and steps, is another teacher."""
    folding = as_consolidated(cfg)
    bank, product = DeltaBank(cfg.bank_of().root), folding.folder.product("consolidated")
    result, made = product.with_suffix(".json"), folding.folder.progress("consolidated") / "made_of.json"
    _begin(folding, bank, result)
    for path in (product, result):
        path.write_text("{}")
    # Nothing is forgotten of what is as it was, or says less, as that of an earlier release.
    write_json(made, {key: value for key, value in read_json(made).items() if key != "files"})
    _begin(folding, bank, result)
    assert product.is_file()
    assert result.is_file()
    _begin(folding, bank, result)
    before, facts = bank.own_delta(TASKS[0]), bank.facts(TASKS[0])["training"]
    signature, prompts = bank.signature(TASKS[0]), bank.prompts(TASKS[0])
    assert before is not None
    later = replace(before, values={name: values + 1 for name, values in before.values.items()})
    bank.remove(TASKS[0])
    bank.add(signature, later, facts=facts, prompts=prompts)
    _begin(folding, bank, result)
    assert not product.exists()
    assert not result.exists()
    result.write_text("{}")
    _begin(folding, bank, result)
    assert not result.exists()


def test_a_run_may_have_the_name_of_its_folder(cfg: RunConfig) -> None:
    run = Path(cfg.run_dir).with_name("consolidate")
    folding = as_consolidated(replace(cfg, run_dir=str(run)))
    assert folding.run_dir == str(run / "consolidate")
    assert as_consolidated(folding) == folding


def test_without_a_bank_or_its_task_it_is_refused(cfg: RunConfig) -> None:
    nowhere = replace(cfg, bank=replace(cfg.bank, path=str(Path(cfg.run_dir) / "nowhere")))
    with pytest.raises(ValueError, match="nowhere"):
        as_consolidated(nowhere)
    DeltaBank(cfg.bank_of().root).remove(TASKS[1])
    with pytest.raises(ValueError, match=f"does not hold {TASKS[1]}"):
        run_consolidate(as_consolidated(cfg))
