"""What is said to help where a training diverges: results that lie in the run folder keep its rate from being lowered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trace_dist.config import ContinualConfig, ModelConfig, RunConfig, TaskConfig
from trace_dist.continual.setting import Setting

FOLDER = "a lower rate needs another run_dir, since "


@pytest.mark.parametrize(
    ("method", "task", "there", "options", "cure"),
    [
        ("retrieved", "a", [], {}, None),
        ("retrieved", "a", ["progress/retrieved/trained/a.json"], {}, None),
        ("retrieved", "b", ["progress/retrieved/trained/a.json"], {}, FOLDER),
        ("full", "a", ["methods/retrieved.json"], {}, "set continual.options.full.lr to a lower one and start the same"),
        ("full", "a", ["methods/retrieved.json"], {"full": {"lr": 0.5}}, None),
        ("full", "b", ["progress/full/trained/a.json"], {"full": {"lr": 0.5}}, FOLDER),
        ("train", "b", [], {}, None),
        ("train", "b", ["deltas/a.safetensors"], {}, FOLDER),
    ],
)  # fmt: skip
def test_the_cure_works(
    method: str, task: str, there: list[str], options: dict[str, Any], cure: str | None, tmp_path: Path
) -> None:
    cfg = RunConfig(ModelConfig("m"), [TaskConfig(name, "t.jsonl") for name in "ab"], str(tmp_path))
    cfg = replace(cfg, continual=ContinualConfig([method] if method != "train" else ["full"], options))
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    streams = [SimpleNamespace(task=each) for each in cfg.tasks]
    setting = Setting(cfg, cast(Any, SimpleNamespace(tasks=streams)), "m", "")
    with setting.training(method, task) as given:
        found = given["cure"]
    assert found is None if cure is None else found.startswith(cure)
