"""The configuration refuses what cannot work: each message names the field, its value, the rule and a cure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from trace_dist import config as c
from trace_dist.cli.main import main
from trace_dist.cli.parser import build_parser, run_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SECTIONS = [each for each in vars(c).values() if is_dataclass(each)]


def task(**changes: Any) -> c.TaskConfig:
    return c.TaskConfig(**{"name": "t", "path": "t.jsonl"} | changes)


def nf4():
    return c.ModelConfig("m", quantize="nf4")


def run(**changes: Any) -> c.RunConfig:
    return c.RunConfig(**{"run_dir": "r", "target": c.ModelConfig("m"), "tasks": [task()]} | changes)


@pytest.mark.parametrize(
    ("make", "field", "rule"),
    [
        (lambda: c.MaskConfig(density=0), "mask.density", "must lie in (0, 1]"),
        (lambda: c.MaskConfig(density=1.01), "mask.density", "must lie in (0, 1]"),
        (lambda: c.MaskConfig(density=float("nan")), "mask.density", "must lie in (0, 1]"),
        (lambda: c.MaskConfig(block=0), "mask.block", "must be at least 1"),
        (lambda: c.TinyConfig(hidden_size=10, num_heads=3), "tiny.hidden_size", "multiple of num_heads=3"),
        (lambda: c.TinyConfig(steps=-1), "tiny.steps", "must not be negative"),
        (lambda: c.PruneConfig(keep_layers=0), "prune.keep_layers", "must be at least 1"),
        (lambda: c.ModelConfig("m", tiny=c.TinyConfig(), gguf="g"), "model", "at most one of tiny, gguf"),
        (lambda: task(path=None), "tasks.t", "exactly one of path and reasoning_gym"),
        (lambda: task(reasoning_gym={"dataset": "d"}), "tasks.t", "exactly one of path and reasoning_gym"),
        (lambda: task(path=None, reasoning_gym={"size": 1}), "tasks.t.reasoning_gym", "key 'dataset'"),
        (lambda: task(name=""), "tasks.name", "must be a non-empty text"),
        (lambda: task(name="a/b"), "tasks.name", "must not hold '/'"),
        (lambda: task(name="Base"), "tasks.name", "is reserved for the base model"),
        (lambda: task(num_test=0), "tasks.t.num_test", "must be at least 1"),
        (lambda: c.ProbeConfig(steps=0), "probe.steps", "must be at least 1"),
        (lambda: c.ProbeConfig(fisher_batches=0), "probe.fisher_batches", "must be at least 1"),
        (lambda: c.ProjectionConfig(pool_density=0), "projection.pool_density", "must lie in (0, 1]"),
        (lambda: c.TrainConfig(steps=0), "train.steps", "must be at least 1"),
        (lambda: c.TrainConfig(lr=0), "train.lr", "must be positive"),
        (lambda: c.TrainConfig(weight_decay=-0.1), "train.weight_decay", "must not be negative"),
        (lambda: c.ContinualConfig(methods=[]), "continual.methods", "at least one method"),
        (lambda: c.ContinualConfig(methods=["full", "full"]), "continual.methods", "named twice"),
        (lambda: c.LaunchConfig(num_ranks=0), "launch.num_ranks", "must be at least 1"),
        (lambda: c.LaunchConfig(num_ranks=2), "launch.num_ranks", "needs a launcher"),
        (lambda: run(tasks=[]), "tasks", "at least one task"),
        (lambda: run(general=[task()]), "tasks.name", "names must be unique"),
        (lambda: run(target=c.ModelConfig("m", prune=c.PruneConfig())), "target.prune", "only a proxy"),
        (lambda: run(target=nf4()), "target.quantize", "probing trains every weight"),
        (lambda: run(target=nf4(), proxy=nf4()), "proxy.quantize", "probing trains every weight"),
        (lambda: run(launch=c.LaunchConfig("torchrun", 2)), "launch.num_ranks", "backend single runs in one"),
        (lambda: run(tasks=[task(metric="bits_per_byte")]), "tasks.metric", "bits_per_byte is for general"),
        (lambda: c.TinyConfig(num_layers=0), "tiny.num_layers", "must be at least 1"),
        (lambda: task(steps=0), "tasks.t.steps", "must be at least 1"),
        (lambda: c.DataConfig(max_length=1), "data.max_length", "must be at least 2"),
        (lambda: c.DataConfig(num_proc=0), "data.num_proc", "must be at least 1"),
        (lambda: c.ProbeConfig(batch_size=0), "probe.batch_size", "must be at least 1"),
        (lambda: c.ProbeConfig(lr=0), "probe.lr", "must be positive"),
        (lambda: c.ProbeConfig(specificity_weight=-1), "probe.specificity_weight", "must be at least 0"),
        (lambda: c.ProjectionConfig(narrow_steps=0), "projection.narrow_steps", "must be at least 1"),
        (lambda: c.TrainConfig(betas=(0.9, 1.0)), "train.betas", "both must lie in [0, 1)"),
        (lambda: c.TrainConfig(max_grad_norm=0), "train.max_grad_norm", "must be positive"),
        (lambda: c.TrainConfig(min_lr_ratio=2), "train.min_lr_ratio", "must lie in [0, 1]"),
        (lambda: c.BankConfig(clusters=0), "bank.clusters", "must be at least 1"),
        (lambda: c.EvalConfig(max_new_tokens=0), "eval.max_new_tokens", "must be at least 1"),
        (lambda: c.LaunchConfig(parallel_stages=0), "launch.parallel_stages", "must be at least 1"),
        (
            lambda: run(mask=c.MaskConfig(density=0.2), proxy=c.ModelConfig("p")),
            "projection.pool_density",
            "at least mask.density=0.2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rules(make: Callable[[], object], field: str, rule: str) -> None:
    with pytest.raises(ValueError, match=r"=.*; ") as caught:
        make()
    message = str(caught.value)
    name, _, rest = message.partition("=")
    value_and_rule, semicolon, cure = rest.rpartition(";")
    assert name == field
    assert rule in value_and_rule
    assert semicolon
    assert len(cure.split()) >= 2
    assert "\n" not in message


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_sections_are_frozen_and_every_field_is_explained(section: type) -> None:
    assert section.__dataclass_params__.frozen
    lines = (
        Path(c.__file__)
        .read_text()
        .split(f"class {section.__name__}:")[1]
        .split("@dataclass")[0]
        .splitlines()
    )
    for each in fields(section):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {each.name}: "))
        assert lines[at + 1].strip().startswith('"""'), f"{section.__name__}.{each.name} has no docstring"
    assert get_type_hints(section)


def test_a_section_that_is_not_used_is_not_checked_against_others() -> None:
    """Without a proxy nothing is projected, so the pool may be smaller than the mask."""
    assert run(mask=c.MaskConfig(density=0.2)).projection.pool_density < 0.2


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        run().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_valid_and_open_with_hardware_and_time(path: Path) -> None:
    values = build_parser().parse_args(["run", "--config", str(path)])
    cfg = run_config(build_parser().instantiate_classes(values)["run"])
    assert [each.name for each in cfg.tasks] == [
        each["name"] for each in yaml.safe_load(path.read_text())["tasks"]
    ]
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("Hardware" in line for line in header)
    assert any("ime" in line for line in header)


def test_overrides_and_defaults() -> None:
    arguments = ["train", "--config", str(CONFIGS[0]), "--mask.density", "0.01", "--train.betas", "[0.8,0.9]"]
    arguments += ["--train.max_grad_norm", "null", "--task_name", "spiral"]
    parser = build_parser()
    values = parser.instantiate_classes(parser.parse_args(arguments))["train"]
    cfg = run_config(values)
    assert (cfg.mask.density, cfg.train.betas, cfg.train.max_grad_norm) == (0.01, (0.8, 0.9), None)
    assert values["task_name"] == "spiral"
    assert cfg.data == c.DataConfig()
    assert cfg.probed is cfg.proxy
    assert run().probed == c.ModelConfig("m")


def test_help_shows_the_docstrings_of_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Share of the maskable elements that are trained, in (0, 1]." in text
    assert "name of the task to train; the first one when not given" in text


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["train"], "required: train.run_dir, train.target.path, train.tasks"),
        ([], "{run,base,probe"),
        (["mask", "show"], "file"),
        (["mask", "combine", "xor", "a", "b", "--out", "c"], "invalid choice: 'xor'"),
    ],
)
def test_missing_arguments(arguments: list[str], fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert fragment in line
