"""A stream of commands, and one that goes on where it was cut; a test for the JSON that the page of results is made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli.program import environment, make_config, write_config, write_tasks

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.benchmarks import stream

RESULT = Path(__file__).parents[2] / "docs" / "results" / "stream20.json"


def test_tasks_are_learned_by_commands_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    write_tasks(tmp_path)
    config = make_config(tmp_path) | {"backend": "single"}
    config["bank"] |= {"layer": 0}
    path, out, learn = write_config(tmp_path, config), tmp_path / "stream.json", stream._learn

    def cut(whole: Any, task: Any, *folders: Path) -> Any:
        if task["name"] == "twist":
            raise KeyboardInterrupt
        return learn(whole, task, *folders)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_learn", cut)
        with pytest.raises(KeyboardInterrupt):
            stream.run_stream(path, out)
    (first,) = json.loads(out.read_text())["tasks"]
    result = stream.run_stream(path, out)
    assert result == json.loads(out.read_text())
    again, second = result["tasks"]
    # The first is not learned again, and answers as it did.
    assert first.items() < again.items()
    assert again["final"] == again["learned"]
    assert second["name"] == "twist"
    assert second["wall_s"] > 0
    assert second["processor_s"] > 0
    assert second["peak_rss_bytes"] > 2**27
    assert DeltaBank(tmp_path / "run" / "bank").tasks == [BASE, "copy", "twist"]
    assert result["again"]["name"] == "copy_again"
    assert DeltaBank(tmp_path / "run" / "bank_again").tasks == [BASE, "copy", "twist", "copy_again"]


def test_nothing_was_forgotten_and_nothing_grew_in_the_published_stream() -> None:
    result = json.loads(RESULT.read_text())
    tasks, again = result["tasks"], result["again"]
    assert len(tasks) == 20
    for task in tasks:
        if task["retrieved_percent"] == 100:
            assert task["final"] == task["learned"], task["name"]
    assert again["name"] == f"{tasks[0]['name']}_again"
    assert again["processor_s"] < 1.25 * tasks[0]["processor_s"]
    assert again["peak_rss_bytes"] < 1.05 * tasks[0]["peak_rss_bytes"]
