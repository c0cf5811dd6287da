"""The eight tasks of the TRACE benchmark in little: run from one configuration, each scored by its own metric."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trace_dist.benchmarks.trace_layout import SPLITS, write_layout
from trace_dist.cli.parser import parse, run_config
from trace_dist.config import RunConfig
from trace_dist.continual.driver import run_continual
from trace_dist.data import load_task
from trace_dist.evaluation.metric import load_metric
from trace_dist.run_folder import RunFolder
from trace_dist.stages.base import prepare_base
from trace_dist.stages.probe import run_probe

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = (
    "--target.tiny.hidden_size 32 --target.tiny.num_layers 2 --target.tiny.num_heads 2 --target.tiny.intermediate_size 48 "
    "--proxy.tiny.hidden_size 16 --proxy.tiny.num_layers 2 --proxy.tiny.num_heads 2 --proxy.tiny.intermediate_size 24 "
    "--target.tiny.steps 2 --proxy.tiny.steps 2 --probe.steps 2 --probe.fisher_batches 1 --projection.options.steps 2 "
    "--bank.num_prompts 24 --eval.max_new_tokens 4"
)
"""A run in which nothing is learned: that all of it runs."""


def config(name: str, *options: str) -> RunConfig:
    return run_config(parse(["run", "--config", str(CONFIGS / name), *options])["run"])


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The small configuration, in a folder of its own, with steps and examples enough to see that all of it runs."""
    cfg = config("trace-small.yaml", *SHORT.split())
    monkeypatch.chdir(tmp_path)
    write_layout(Path("runs/trace-small/data"))
    tasks = [replace(task, steps=2, num_train=32, num_test=3) for task in cfg.tasks]
    general = [replace(task, num_test=3) for task in cfg.general]
    return replace(cfg, tasks=tasks, general=general)


def test_it_is_the_benchmark_in_little() -> None:
    """The order, the metrics and their options are the benchmark's."""
    one, other = config("trace-small.yaml"), config("trace-benchmark.yaml")
    assert [(task.name, task.metric, task.metric_options) for task in one.tasks] == [
        (task.name, task.metric, task.metric_options) for task in other.tasks
    ]


def test_eight_tasks_run_from_one_configuration_each_with_its_metric(small: RunConfig) -> None:
    for cfg in (*small.tasks, *small.general):
        files = {split: json.loads((Path(str(cfg.path)) / f"{split}.json").read_text()) for split in SPLITS}
        assert {split: len(rows) for split, rows in files.items()} == SPLITS
        assert len({row["prompt"] for rows in files.values() for row in rows}) == sum(SPLITS.values())
    prepare_base(small, "target")
    run_probe(small)
    run_continual(small)
    found = json.loads(RunFolder.of(small.run_dir).method("retrieved").read_text())
    assert len(found["R"]) == len(small.tasks) + 1
    examples = found["retrieval"]["examples"]
    for cfg in small.tasks:
        metric = load_metric(load_task(cfg, small.seed))
        assert metric.compare is not None
        shown = [example for example in examples if example["task"] == cfg.name]
        assert len(shown) == 3
        for example in shown:
            by_hand = metric.compare(example["answer"], example["references"], example["prompt"])
            assert example["score"] == pytest.approx(by_hand)
        mean = sum(each["score"] for each in shown) / len(shown)
        assert found["R"][-1][small.tasks.index(cfg)] == pytest.approx(100 * mean)
