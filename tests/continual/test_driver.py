"""The driver and every method on a real tiny model: the base survives, deltas are what was trained, results add up."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.config import (
    BankConfig,
    ContinualConfig,
    MaskConfig,
    ModelConfig,
    ProbeConfig,
    ProjectionConfig,
    RunConfig,
    TaskConfig,
    TinyConfig,
    TrainConfig,
)
from trace_dist.continual.driver import run_continual
from trace_dist.continual.single_task import run_eval, run_train
from trace_dist.masks.format import Mask
from trace_dist.models.loading import load_model
from trace_dist.probe.probe import run_probe
from trace_dist.probe.project import mask_path, run_project
from trace_dist.report.collect import collect_results
from trace_dist.run_folder import RunFolder
from trace_dist.sharding.build import load_sharded

TASKS = ("copy", "twist")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose masked modes and baselines have all been trained."""
    folder = tmp_path_factory.mktemp("sequence")
    generator = random.Random(0)
    for name in (*TASKS, "plain"):
        words = ["".join(generator.choices("abcdef", k=4)) for _ in range(80)]
        rows = [{"prompt": f"{name}: {w}", "answer": w[::-1] if name == "twist" else w} for w in words]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = folder / "run"
    config = RunConfig(
        run_dir=str(run),
        target=ModelConfig(str(run / "target"), tiny=TinyConfig(32, 2, 2, 48, steps=20, batch_size=16)),
        proxy=ModelConfig(str(run / "proxy"), tiny=TinyConfig(16, 2, 2, 24, steps=20, batch_size=16)),
        tasks=[TaskConfig(name, path=str(folder / f"{name}.jsonl")) for name in TASKS],
        general=[
            TaskConfig("plain", path=str(folder / "plain.jsonl")),
            TaskConfig("text", path=str(folder / "plain.jsonl"), metric="bits_per_byte"),
        ],
        mask=MaskConfig(density=0.1),
        probe=ProbeConfig(steps=4, batch_size=16, fisher_batches=2),
        projection=ProjectionConfig(narrow_steps=4, pool_density=0.3),
        train=TrainConfig(steps=12, lr=1e-2, batch_size=16, micro_batch_size=16, warmup_steps=2),
        continual=ContinualConfig(options={"merged": {"replay": 0.2, "replay_memory": 0.1}}),
        bank=BankConfig(clusters=2, num_prompts=40, layer=0),
    )
    run_probe(config)
    run_project(config)
    run_continual(config)
    return config


def result(cfg: RunConfig, mode: str) -> dict:
    return json.loads(RunFolder.of(cfg.run_dir).method(mode).read_text())


@pytest.mark.parametrize("mode", ["retrieved", "random", "merged", "full", "lora"])
def test_every_mode_reports_its_matrix(cfg: RunConfig, mode: str) -> None:
    found = result(cfg, mode)
    assert [len(row) for row in found["R"]] == [2, 2, 2]
    assert [len(row) for row in found["general"]] == [1, 1, 1]
    assert [len(curve) for curve in found["bits_per_byte"].values()] == [3]
    assert found["average_accuracy"] == pytest.approx(sum(found["R"][-1]) / 2)
    assert {name: curve[-1][0] for name, curve in found["losses"].items()} == {"copy": 12, "twist": 12}
    for curve in found["losses"].values():
        assert curve[-1][1] < curve[0][1]


def test_base_scores_agree_between_modes(cfg: RunConfig) -> None:
    """Row 0 is the untouched base in every mode: masked modes leave it as it was for the next one."""
    rows = {
        json.dumps([result(cfg, mode)["R"][0], result(cfg, mode)["general"][0]])
        for mode in cfg.continual.methods
    }
    assert len(rows) == 1


def test_bank_holds_what_was_trained_and_nothing_else(cfg: RunConfig) -> None:
    bank = DeltaBank(RunFolder.of(cfg.run_dir).bank().root)
    assert bank.tasks == [BASE, *TASKS]
    base = load_model(cfg.target.path, torch.float32).state_dict()
    model = load_sharded(cfg.target.path, "float32")
    for task in TASKS:
        mask = Mask.load(mask_path(cfg, task))
        with bank.activated(model, task):
            tuned = model.full_state_dict()
        for name, values in base.items():
            inside = mask.dense(name) if name in mask else torch.zeros(values.shape, dtype=torch.bool)
            assert torch.equal(tuned[name][~inside], values[~inside]), name
        assert any(not torch.equal(tuned[name], base[name]) for name in mask)
    after = model.full_state_dict()
    assert all(torch.equal(after[name], base[name]) for name in base)


def test_retrieval_counts_every_test_prompt(cfg: RunConfig) -> None:
    retrieval = result(cfg, "retrieved")["retrieval"]
    num_test = json.loads(RunFolder.of(cfg.run_dir).tasks.read_text())["num_test"]
    assert retrieval["columns"] == [BASE, *TASKS]
    assert [sum(row) for row in retrieval["confusion"]] == num_test
    right = sum(retrieval["confusion"][i][i + 1] for i in range(2))
    assert retrieval["accuracy"] == pytest.approx(100 * right / sum(num_test))


def test_lora_trains_as_many_parameters_as_the_mask(cfg: RunConfig) -> None:
    trained = result(cfg, "lora")["trainable"]
    per_rank = trained / result(cfg, "lora")["lora_rank"]
    assert abs(trained - result(cfg, "retrieved")["trainable"]) <= per_rank / 2 + 1


def test_train_and_eval_commands_reproduce_the_sequence(cfg: RunConfig) -> None:
    """`train` from the same base, mask and seed gives the delta that the sequence put into the bank."""
    path = run_train(cfg, "copy", None)
    assert path.read_bytes() == DeltaBank(RunFolder.of(cfg.run_dir).bank().root).path("copy").read_bytes()
    scores = run_eval(cfg, str(RunFolder.of(cfg.run_dir).bank().root))
    assert [scores[task] for task in TASKS] == pytest.approx(result(cfg, "retrieved")["R"][-1])
    plain = run_eval(cfg, None)
    assert [plain[task] for task in TASKS] == pytest.approx(result(cfg, "retrieved")["R"][0])


def test_results_are_collected(cfg: RunConfig) -> None:
    results = collect_results(cfg)
    assert set(results["modes"]) == set(cfg.continual.methods)
    assert set(results["masks"]["target"]) == set(TASKS)
    heat = results["masks"]["target"]["copy"]
    density = [cell for row in heat["density"] for cell in row if cell is not None]
    assert heat["layers"] == 2
    assert 0 < max(density) <= 1
    json.dumps(results, allow_nan=False)


def test_a_mode_with_a_result_is_kept(cfg: RunConfig) -> None:
    before = RunFolder.of(cfg.run_dir).method("retrieved").stat().st_mtime_ns
    run_continual(replace(cfg, continual=replace(cfg.continual, methods=["retrieved"])))
    assert RunFolder.of(cfg.run_dir).method("retrieved").stat().st_mtime_ns == before


def test_mask_of_another_model_is_refused(cfg: RunConfig, tmp_path: Path) -> None:
    mask = Mask.load(mask_path(cfg, "copy")).with_meta(model="somebody-else")
    mask.save(tmp_path / "mask.safetensors")
    with pytest.raises(ValueError, match="somebody-else"):
        run_train(cfg, "copy", str(tmp_path / "mask.safetensors"))


def test_unknown_task_is_refused(cfg: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"task_name='nope'.*copy, twist"):
        run_train(cfg, "nope", None)
