"""What a result depends on, of a configuration."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

from trace_dist.config import ModelConfig, RunConfig, TaskConfig
from trace_dist.config.how_it_runs import HOW_IT_RUNS, decisive


def make(folder: Path) -> RunConfig:
    return RunConfig(ModelConfig("m"), [TaskConfig("t", "t.jsonl")], str(folder), proxy=ModelConfig("p"))


def test_every_field_that_decides_nothing_exists(tmp_path: Path) -> None:
    for name in HOW_IT_RUNS:
        value = make(tmp_path)
        for part in name.split("."):
            assert is_dataclass(value)
            assert part in [each.name for each in fields(value)], name
            value = getattr(value, part)


def test_what_a_result_was_made_with(tmp_path: Path) -> None:
    cfg = make(tmp_path)
    about = {"train": asdict(cfg.train), "data": asdict(cfg.data), "seed": 1, "bank": {"launch": {"lr": 1}}}
    found = decisive(about)
    assert found == json.loads(json.dumps(found))
    assert decisive(found) == found
    assert "lr" in found["train"]
    assert found["bank"] == about["bank"]
    train = replace(cfg.train, checkpoint_minutes=9.0, log_every=1, max_bad_steps=0, trackers=())
    assert decisive(about | {"train": asdict(train), "data": asdict(replace(cfg.data, num_proc=2))}) == found
    assert decisive(about | {"train": asdict(replace(cfg.train, steps=9))}) != found
    assert decisive(["damaged"]) == ["damaged"]
