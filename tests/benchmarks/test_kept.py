"""What a benchmark that was cut goes on from: its own measurements, not those of other code or another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trace_dist.benchmarks import scale, step
from trace_dist.benchmarks.contestants import Race
from trace_dist.utils import env
from trace_dist.utils.files import read_json, write_json

CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "code": {"run_info": {"commit": "0123456789ab"}},
    "hardware": {"meta_info": {"hardware": "another"}},
    "versions": {"meta_info": {"versions": {"torch": "1.0"}}},
}


def changed(out: Path, change: str) -> None:
    result = json.loads(out.read_text())
    write_json(out, result | {key: result[key] | new for key, new in CHANGES[change].items()})


@pytest.mark.parametrize("change", CHANGES)
def test_a_race(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run(race: Race, name: str, num_ranks: int, steps: int) -> dict[str, Any]:
        started.append(name)
        return {"error": "not here"}

    monkeypatch.setattr(step, "_run", run)
    out = tmp_path / "step.json"
    step.race_in_turn(Race("tiny"), ["row", "full"], 1, 1, 1, out)
    changed(out, change)
    result = step.race_in_turn(Race("tiny"), ["row", "full"], 1, 2, 1, out)
    assert started == ["row", "full"] * (2 if change == "none" else 3)
    assert env.made_alike(result)


@pytest.mark.parametrize("change", CHANGES)
def test_the_study_of_scale(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    class Study:
        def __init__(self, results: Path, folder: Path) -> None:
            self.parts = {name: lambda name=name: done.append(name) for name in ("one", "two")}

    monkeypatch.setattr(scale, "Study", Study)
    out = tmp_path / "scale.json"
    scale.main(out)
    changed(out, change)
    scale.main(out)
    assert done == ["one", "two"] * (1 if change == "none" else 2)
    assert list(read_json(out)["parts"]) == ["one", "two"]
