"""The driver and every method on a real tiny model: the base survives, deltas are what was trained, results add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from continual.small import METHODS, STEPS, TASKS, result

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.config import RunConfig
from trace_dist.continual.driver import run_continual
from trace_dist.masks.mask import Mask
from trace_dist.models.loading import load_model
from trace_dist.run_folder import RunFolder
from trace_dist.sharding.build import load_sharded
from trace_dist.stages.continual import describe
from trace_dist.stages.learn import as_learned
from trace_dist.stages.report import collect_results
from trace_dist.stages.start import keep_config


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reports_its_matrix(whole: RunConfig, method: str) -> None:
    found = result(whole, method)
    assert [len(row) for row in found["R"]] == [2, 2, 2]
    assert [len(row) for row in found["general"]] == [1, 1, 1]
    assert [len(curve) for curve in found["bits_per_byte"].values()] == [3]
    assert found["average_accuracy"] == pytest.approx(sum(found["R"][-1]) / 2)
    assert {name: curve[-1][0] for name, curve in found["losses"].items()} == dict.fromkeys(TASKS, STEPS)
    curve = found["losses"][TASKS[0]]
    assert curve[-1][1] < curve[0][1]


def test_base_scores_agree_between_methods(whole: RunConfig) -> None:
    """Row 0 is the untouched base with every method: masked ones leave it as it was for the next one."""
    rows = {
        json.dumps([result(whole, method)["R"][0], result(whole, method)["general"][0]])
        for method in whole.continual.methods
    }
    assert len(rows) == 1


def test_bank_holds_what_was_trained_and_nothing_else(whole: RunConfig) -> None:
    bank = DeltaBank(RunFolder.of(whole.run_dir).bank().root)
    assert bank.tasks == [BASE, *TASKS]
    base = load_model(whole.target.path, torch.float32).state_dict()
    model = load_sharded(whole.target.path, "float32")
    for task in TASKS:
        mask = Mask.load(RunFolder.of(whole.run_dir).mask(task))
        with bank.activated(model, task):
            tuned = model.full_state_dict()
        for name in model.names():
            values = base[name]
            inside = mask.dense(name) if name in mask else torch.zeros(values.shape, dtype=torch.bool)
            assert torch.equal(tuned[name][~inside], values[~inside]), name
        assert any(not torch.equal(tuned[name], base[name]) for name in mask)
    after = model.full_state_dict()
    assert all(torch.equal(after[name], base[name]) for name in base)


def test_retrieval_counts_every_test_prompt(whole: RunConfig) -> None:
    retrieval = result(whole, "retrieved")["retrieval"]
    num_test = json.loads(RunFolder.of(whole.run_dir).tasks.read_text())["num_test"]
    assert retrieval["columns"] == [BASE, *TASKS]
    assert [sum(row) for row in retrieval["confusion"]] == num_test
    right = sum(retrieval["confusion"][i][i + 1] for i in range(2))
    assert retrieval["accuracy"] == pytest.approx(100 * right / sum(num_test))


def test_lora_trains_as_many_parameters_as_the_mask(whole: RunConfig) -> None:
    trained = result(whole, "lora")["trainable"]
    per_rank = trained / result(whole, "lora")["lora_rank"]
    assert abs(trained - result(whole, "retrieved")["trainable"]) <= per_rank / 2 + 1


def test_results_are_collected(whole: RunConfig) -> None:
    results = collect_results(whole)
    assert set(results["modes"]) == set(whole.continual.methods)
    assert set(results["masks"]["target"]) == set(TASKS)
    heat = results["masks"]["target"][TASKS[0]]
    density = [cell for row in heat["density"] for cell in row if cell is not None]
    assert heat["layers"] == 2
    assert 0 < max(density) <= 1
    json.dumps(results, allow_nan=False)


def test_a_method_with_a_result_is_kept(whole: RunConfig) -> None:
    before = RunFolder.of(whole.run_dir).method("retrieved").stat().st_mtime_ns
    run_continual(replace(whole, continual=replace(whole.continual, methods=["retrieved"])))
    assert RunFolder.of(whole.run_dir).method("retrieved").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "text",
    [
        *("", '{"R": [[', "[]", "{}", '{"R": 3}'),
        '{"R": [], "general_names": [], "just_trained": [], "measured": {"date": 3}}',
        '{"R": [NaN], "general_names": [], "just_trained": [], "measured": {}}',
    ],
)
def test_a_damaged_result_is_refused_where_it_would_be_kept(
    whole: RunConfig, text: str, tmp_path: Path
) -> None:
    """By the command that keeps it, by the run that starts that command, and by the report."""
    cfg = replace(whole, run_dir=str(tmp_path), continual=replace(whole.continual, methods=["retrieved"]))
    cfg.folder.methods.mkdir()
    cfg.folder.method("retrieved").write_text(text)
    for work in (run_continual, collect_results, lambda cfg: describe(cfg, ["retrieved"])):
        with pytest.raises(
            ValueError, match=r"retrieved\.json: (damaged .*|not valid JSON .*); .*delete it"
        ) as caught:
            work(cfg)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["run", "learn"])
def test_a_first_task_that_diverged_is_learned_at_a_lower_rate(
    command: str, fresh: RunConfig, tmp_path: Path
) -> None:
    """As the message says, in the same run folder, where the base's scores and signature lie by then."""
    cfg = fresh
    if command == "learn":
        cfg = as_learned(replace(cfg, bank=replace(cfg.bank, path=str(tmp_path / "bank"))))
    high = replace(cfg, train=replace(cfg.train, lr=1e38))
    keep_config(high, whole_run=True)
    with pytest.raises(ValueError, match=r"^train\.lr=1e\+38: .*lower train\.lr and start the same command"):
        run_continual(high)
    assert (cfg.folder.progress("retrieved") / "progress.json").is_file()
    keep_config(cfg, whole_run=True)
    run_continual(cfg)
    assert result(cfg, "retrieved")["lr_by_task"] == dict.fromkeys(TASKS, cfg.train.lr)
    with pytest.raises(ValueError, match=r"made with other values of train\.lr; choose another run_dir"):
        keep_config(high, whole_run=True)
