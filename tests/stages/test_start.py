"""What a command does with the configuration that lies in its run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from trace_dist.config import ContinualConfig, LaunchConfig, ModelConfig, RunConfig, TaskConfig
from trace_dist.stages.start import start


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    tasks = [TaskConfig(name="t", path="t.jsonl")]
    return RunConfig(run_dir=str(tmp_path / "run"), target=ModelConfig("m"), tasks=tasks)


def stored(cfg: RunConfig) -> dict:
    return yaml.safe_load((Path(cfg.run_dir) / "config.yaml").read_text())


def test_the_configuration_is_kept_beside_the_results(cfg: RunConfig) -> None:
    start(cfg, "base")
    assert stored(cfg)["target"]["path"] == "m"
    before = (Path(cfg.run_dir) / "config.yaml").stat().st_mtime_ns
    start(cfg, "base")
    assert (Path(cfg.run_dir) / "config.yaml").stat().st_mtime_ns == before


def test_other_values_are_refused_once_there_is_a_result(cfg: RunConfig) -> None:
    start(cfg, "base")
    start(replace(cfg, seed=1), "base")  # nothing was made yet: a mistake may be mended
    assert stored(cfg)["seed"] == 1
    (Path(cfg.run_dir) / "models" / "target").mkdir(parents=True)
    start(cfg, "base")
    (Path(cfg.run_dir) / "models" / "target" / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"run_dir='.*/run': .* other values of data\.max_length, seed; choose"
    ):
        start(replace(cfg, seed=1, data=replace(cfg.data, max_length=9)), "base")
    assert stored(cfg)["seed"] == 0


def test_how_a_run_is_carried_out_may_differ(cfg: RunConfig) -> None:
    """A stage leaves the file alone; `run` writes its own values, since its stages read them there."""
    (Path(cfg.run_dir)).mkdir()
    (Path(cfg.run_dir) / "metrics.jsonl").write_text("")
    start(cfg, "base")
    launched = replace(
        cfg,
        backend="zero3",
        launch=LaunchConfig("deepspeed", 2),
        continual=ContinualConfig(methods=["full"]),
    )
    start(launched, "base")
    assert stored(cfg)["backend"] == "single"
    start(launched, "run")
    assert stored(cfg)["backend"] == "zero3"
    assert stored(cfg)["launch"]["num_ranks"] == 2
    start(cfg, "base")
    assert stored(cfg)["backend"] == "zero3"


def test_a_damaged_configuration_is_one_line(cfg: RunConfig) -> None:
    start(cfg, "base")
    (Path(cfg.run_dir) / "config.yaml").write_text("{{{")
    with pytest.raises(
        ValueError, match=r"config\.yaml: cannot be read .*; restore it or delete the run folder"
    ):
        start(cfg, "base")
