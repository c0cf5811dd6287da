"""Trackers by name, with their own packages and without a network: what each keeps of two trainings."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from trace_dist.run_folder import RunFolder
from trace_dist.train.metric_log import PACKAGES, MetricLog, check_trackers

LOSSES = {1: 0.5, 2: 0.25}
TAGS = ("base/proxy", "full/copy")
Kept = dict[str, dict[int, float]]
"""Training -> step -> loss."""


def wandb(folder: Path) -> None:
    """One file of its own form for each training."""
    _files(sorted(folder.glob("wandb/offline-run-*/run-*.wandb")))


def swanlab(folder: Path) -> None:
    _files(sorted(folder.glob("swanlog/run-*/run-*.swanlab")))


def _files(files: list[Path]) -> None:
    contents = [file.read_bytes() for file in files]
    assert len(contents) == len(TAGS)
    for content in contents:
        assert b"myrun" in content
        assert content.count(b"loss") >= len(LOSSES)
    assert [sum(tag.encode() in content for content in contents) for tag in TAGS] == [1, 1]


def trackio(folder: Path) -> None:
    with sqlite3.connect(folder / "trackio" / "myrun.db") as data:
        rows = data.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    found: Kept = {}
    for tag, step, values in rows:
        found.setdefault(tag, {})[step] = json.loads(values)["loss"]
    assert found == dict.fromkeys(TAGS, LOSSES)


def mlflow(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'myrun'")
    found = {
        run.info.run_name: {
            each.step: each.value for each in client.get_metric_history(run.info.run_id, "loss")
        }
        for run in client.search_runs([experiment.experiment_id])
    }
    assert found == dict.fromkeys(TAGS, LOSSES)


@pytest.mark.parametrize("read", [wandb, swanlab, trackio, mlflow])
def test_each_training_is_a_run_of_the_project(
    read: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = read.__name__
    if find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{name} is not installed: pip install {PACKAGES[name]}")
    monkeypatch.chdir(tmp_path)
    for key, value in {
        "HOME": str(tmp_path),
        "WANDB_MODE": "offline",
        "SWANLAB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }.items():
        monkeypatch.setenv(key, value)
    check_trackers([name])
    (tmp_path / "myrun").mkdir()
    for tag in TAGS:
        log = MetricLog(RunFolder(tmp_path / "myrun"), tag, (name,))
        for step, loss in LOSSES.items():
            log.write(step, {"loss": loss, "lr": 1e-3})
        log.close()
    read(tmp_path)
