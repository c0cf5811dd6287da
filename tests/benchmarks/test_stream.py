"""A stream of commands, and one that goes on where it was cut; a test for the JSON that the page of results is made from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from cli.program import environment, make_config, write_config, write_tasks
from launching import python

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.benchmarks import later, stream

RESULTS = Path(__file__).parents[2] / "docs" / "results"
RESULT, LATER = RESULTS / "stream20.json", RESULTS / "learn_later.json"


def test_tasks_are_learned_by_commands_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The task whose measures are looked at has a process of its own; other commands may be forks, and what it starts.
    warm = {"PYTHONPATH": str(Path(__file__).parents[1] / "warm" / "children"), "TEST_PYTHON": python()}
    for name, value in (environment(tmp_path / "cache") | warm).items():
        monkeypatch.setenv(name, value)
    write_tasks(tmp_path)
    config = make_config(tmp_path) | {"backend": "single"}
    config["bank"] |= {"layer": 0}
    path, out, learn = write_config(tmp_path, config), tmp_path / "stream.json", stream._learn

    interpreter = sys.executable
    monkeypatch.setattr(sys, "executable", python())

    def measured(whole: Any, task: Any, *folders: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if task["name"] == "twist":
                patch.setattr(sys, "executable", interpreter)
            return learn(whole, task, *folders)

    def cut(whole: Any, task: Any, *folders: Path) -> Any:
        if task["name"] == "twist":
            raise KeyboardInterrupt
        return learn(whole, task, *folders)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_learn", cut)
        with pytest.raises(KeyboardInterrupt):
            stream.run_stream(path, out)
    monkeypatch.setattr(stream, "_learn", measured)
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
    # The next day another task comes.
    models = {role: {"path": config[role]["path"]} for role in ("target", "proxy")}
    parts = {name: config[name] for name in ("probe", "projection", "train")}
    new = [{"name": "new", "path": str(tmp_path / "twist.jsonl")}]
    task = write_config(tmp_path, models | parts | {"tasks": new}, "later.yaml")
    found = later.learn_later(path, task, tmp_path / "later.json")
    assert found == json.loads((tmp_path / "later.json").read_text())
    assert (found["new"], found["files_that_changed"]) == (["new"], [])
    assert found["files_of_earlier_tasks"] == len(list((tmp_path / "run" / "bank" / "tasks").rglob("*.*")))
    assert found["scores_after"].keys() == found["answered_by"].keys() == {"copy", "twist", "new", "plain"}
    assert found["scores_before"].keys() == {"copy", "twist", "plain"}
    assert DeltaBank(tmp_path / "run" / "later" / "bank").tasks == [BASE, "copy", "twist", "new"]
    assert DeltaBank(tmp_path / "run" / "bank").tasks == [BASE, "copy", "twist"]


def test_the_published_fourth_task_is_retrieved_and_changed_nothing() -> None:
    result = json.loads(LATER.read_text())
    assert result["files_that_changed"] == []
    assert result["files_of_earlier_tasks"] > 0
    before, after = result["scores_before"], result["scores_after"]
    assert {name: after[name] for name in before} == before
    for task in ("reverse", "spiral", "rotate"):
        assert before[task] >= 98, task
    for task in ("reverse", "spiral", "rotate", "rotate_270"):
        assert result["answered_by"][task][task] >= 0.98 * sum(result["answered_by"][task].values()), task


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


def test_the_page_says_what_a_full_bank_costs() -> None:
    result, page = json.loads(RESULT.read_text()), (RESULTS.parent / "benchmarks.md").read_text()
    share = result["again"]["processor_s"] / result["tasks"][0]["processor_s"]
    assert f"into a copy of the full bank: {share:.2f} of the time" in page
