"""Which fields may change in a run folder, given what lies in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from trace_dist.config import ModelConfig, PruneConfig, RunConfig, TaskConfig
from trace_dist.stages.changes import completed, differing_fields, forbidden

LOGS = [
    "config.yaml",
    "metrics.jsonl",
    "tensorboard/base/target/events",
    "trackers/wandb/log",
    "logs/base.txt",
    "stages.json",
    "progress/retrieved/race.json",
    "progress/consolidated/made_of.json",
    ".lock",
]
BASES = ["models/target/config.json", "models/proxy/config.json"]
PROBED = ["probe/t.safetensors", "probe/masks/t.safetensors"]
MASKS = ["masks/t.safetensors", "masks/random/t.safetensors"]
BEGUN = ["progress/retrieved/progress.json", "bank/bank.json", "bank/tasks/base/signature.safetensors"]
"""What a method leaves before its first task is learned: the base's scores, and a bank with its signature."""


def make(folder: Path) -> RunConfig:
    models = [ModelConfig(str(folder / "models" / name)) for name in ("target", "proxy")]
    return RunConfig(models[0], [TaskConfig("t", "t.jsonl")], str(folder), proxy=models[1])


def fill(folder: Path, files: list[str]) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")


def lower(section: str, name: str, value: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda cfg: replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})


@pytest.mark.parametrize(
    ("change", "there"),
    [
        (lower("train", "lr", 1e-4), [*BASES, *PROBED, *MASKS, "checkpoints/train/t/step-00000004/manifest.json"]),
        (lower("race", "steps", 9), [*BASES, *PROBED, *MASKS, "memory.json"]),
        (lower("train", "max_grad_norm", 0.5), [*BASES, *PROBED, *MASKS, "memory.json"]),
        (lower("projection", "options", {"lr": 1e-4}), [*BASES, *PROBED]),
        (lower("probe", "lr", 1e-4), BASES),
        (
            lower("continual", "options", {"full": {"lr": 1e-4}}),
            [*BASES, *PROBED, *MASKS, "methods/retrieved.json", "bank/bank.json"],
        ),
        (lower("train", "lr", 1e-4), [*BASES, *PROBED, *MASKS, *BEGUN]),
        (lower("race", "steps", 9), [*BASES, *PROBED, *MASKS, *BEGUN]),
        (lower("projection", "options", {"lr": 1e-4}), [*BASES, *PROBED, *BEGUN]),
        (lower("continual", "options", {"retrieved": {"lr": 1e-4}}), [*BASES, *PROBED, *MASKS, *BEGUN]),
        (lower("bank", "composition_options", {"lr": 0.01}), [*BASES, *PROBED, *MASKS, *BEGUN]),
        (lambda cfg: replace(cfg, tasks=[replace(cfg.tasks[0], steps=7)]), [*BASES, *PROBED, *MASKS, *BEGUN]),
        (lambda cfg: replace(cfg, seed=1), []),
        (lambda cfg: replace(cfg, proxy=ModelConfig(cfg.proxy.path, dtype="bfloat16")), BASES[:1]),
        (lambda cfg: replace(cfg, target=ModelConfig(cfg.target.path, dtype="bfloat16")), [BASES[1], *PROBED]),
        (lambda cfg: replace(cfg, tasks=[replace(cfg.tasks[0], steps=7)]), [*BASES, *PROBED, *MASKS]),
    ],
)  # fmt: skip
def test_work_that_has_no_result_may_change(
    change: Callable[[RunConfig], RunConfig], there: list[str], tmp_path: Path
) -> None:
    old = make(tmp_path)
    new = change(old)
    fill(tmp_path, [*LOGS, *there])
    fields = differing_fields(asdict(old), asdict(new))
    assert len(fields) == 1
    assert forbidden(new, fields) == {}


@pytest.mark.parametrize(
    ("change", "field", "result"),
    [
        (lower("train", "lr", 1e-4), "train.lr", "deltas/u.safetensors"),
        (lower("train", "lr", 1e-4), "train.lr", "methods/full.json"),
        (lower("train", "lr", 1e-4), "train.lr", "bank/deltas/t.safetensors"),
        (lower("train", "lr", 1e-4), "train.lr", "bank_random/tasks/0001/delta.safetensors"),
        (lower("race", "steps", 9), "race.steps", "progress/retrieved/state-00001/bank.json"),
        (lower("train", "lr", 1e-4), "train.lr", "progress/full/trained/t.json"),
        (lower("continual", "options", {"random": {}}), "continual.options.random", "bank_random/tasks/t/delta.safetensors"),
        (lower("eval", "max_new_tokens", 3), "eval.max_new_tokens", BEGUN[0]),
        (lower("bank", "clusters", 3), "bank.clusters", BEGUN[2]),
        (lambda cfg: replace(cfg, target=ModelConfig(cfg.target.path, dtype="bfloat16")), "target.dtype", BEGUN[0]),
        (lambda cfg: replace(cfg, target=ModelConfig(cfg.target.path, dtype="bfloat16")), "target.dtype", BEGUN[2]),
        (lower("projection", "options", {"lr": 1e-4}), "projection.options.lr", "masks/t.safetensors"),
        (lower("probe", "lr", 1e-4), "probe.lr", "probe/t.safetensors"),
        (lower("mask", "density", 0.02), "mask.density", "masks/random/t.safetensors"),
        (lower("continual", "options", {"lora": {"lr": 1e-4}}), "continual.options.lora", "methods/lora.json"),
        (lower("eval", "max_new_tokens", 3), "eval.max_new_tokens", "eval.json"),
        (lambda cfg: replace(cfg, seed=1), "seed", "models/target/config.json"),
        (lambda cfg: replace(cfg, tasks=[replace(cfg.tasks[0], steps=7)]), "tasks.t.steps", "methods/full.json"),
        (lambda cfg: replace(cfg, tasks=[replace(cfg.tasks[0], num_train=7)]), "tasks.t.num_train", BASES[1]),
        (lambda cfg: replace(cfg, tasks=[TaskConfig("u", "u.jsonl")]), "tasks", BASES[0]),
    ],
)  # fmt: skip
def test_results_of_two_configurations_are_not_mixed(
    change: Callable[[RunConfig], RunConfig], field: str, result: str, tmp_path: Path
) -> None:
    old = make(tmp_path)
    new = change(old)
    fill(tmp_path, [*LOGS, result])
    assert forbidden(new, differing_fields(asdict(old), asdict(new))) == {field: [result]}


def test_a_pruned_proxy_depends_on_its_target(tmp_path: Path) -> None:
    old = make(tmp_path)
    cut = replace(old, proxy=replace(old.proxy, prune=PruneConfig()))
    fill(tmp_path, [BASES[1]])
    assert forbidden(old, ["target.dtype"]) == {}
    assert forbidden(cut, ["target.dtype"]) == {"target.dtype": [BASES[1]]}


def test_a_base_outside_the_folder_is_no_result_of_it(tmp_path: Path) -> None:
    cfg = replace(make(tmp_path), proxy=ModelConfig("elsewhere"))
    assert forbidden(cfg, ["proxy.dtype"]) == {}


def test_how_often_checkpoints_are_kept_changes_nothing(tmp_path: Path) -> None:
    old = make(tmp_path)
    new = replace(
        old, train=replace(old.train, checkpoint_every=5, checkpoint_minutes=1.0, log_every=1, trackers=())
    )
    assert differing_fields(asdict(old), asdict(new)) == []


def test_what_cures_a_lack_of_memory_changes_nothing(tmp_path: Path) -> None:
    """The loss of a step does not depend on the size of micro-batches, nor a score on how many prompts are answered at a time."""
    old = make(tmp_path)
    new = replace(
        old,
        train=replace(old.train, micro_batch_size=1, offload="cpu", activation_checkpointing=True),
        eval=replace(old.eval, batch_size=1),
    )
    assert differing_fields(asdict(old), asdict(new)) == []


def test_a_probe_that_has_not_learned_its_task_is_probed_again(tmp_path: Path) -> None:
    """Traces of the tasks before it say themselves how they were made; masks that are there do not."""
    cfg = make(tmp_path)
    fill(tmp_path, [*LOGS, *BASES, "probe/traces/t.safetensors", "probe/sketches/t.safetensors"])
    assert forbidden(cfg, ["probe.lr", "probe.steps"]) == {}
    assert list(forbidden(cfg, ["mask.density", "proxy.dtype", "seed"])) == [
        "mask.density",
        "proxy.dtype",
        "seed",
    ]
    fill(tmp_path, PROBED)
    assert forbidden(cfg, ["probe.lr"]) == {"probe.lr": sorted(PROBED)}


@pytest.mark.parametrize("name", ["lora", "my_pkg.mine"])
def test_options_of_a_method_by_its_path(name: str, tmp_path: Path) -> None:
    """Results of that method stand in the way of its options, given, changed or left out, and those of others do not."""
    without = make(tmp_path)
    other = {"my_pkg.other": {"k": 1}}
    options = {**other, name: {"k": 1}}
    old, new = (lower("continual", "options", {**options, name: {"k": k}})(without) for k in (1, 2))
    fill(tmp_path, [f"methods/{name}.json", "methods/full.json"])
    for before, after in ((old, new), (old, lower("continual", "options", other)(without))):
        fields = differing_fields(asdict(before), asdict(after))
        assert list(forbidden(after, fields).values()) == [[f"methods/{name}.json"]]
    assert forbidden(new, ["continual.options.my_pkg.other.k"]) == {}


def test_fields_that_an_earlier_release_did_not_have_had_their_defaults(tmp_path: Path) -> None:
    cfg = make(tmp_path)
    present = json.loads(json.dumps(asdict(cfg)))
    kept = json.loads(json.dumps(present))
    del kept["bank"]["keep_prompts"], kept["race"], kept["tasks"][0]["metric"], kept["target"]["quantize"]
    assert completed(kept, cfg) == present
    other = replace(cfg, bank=replace(cfg.bank, keep_prompts=5))
    now = json.loads(json.dumps(asdict(other)))
    assert differing_fields(completed(kept, other), now) == ["bank.keep_prompts"]
    # What is no field of this release is still seen.
    assert completed({**kept, "gone": 1}, cfg)["gone"] == 1
