"""Progress is what was written, or one clear error; a run whose options changed does not mix results."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from continual.small import STEPS, TASKS, result

from trace_dist.bank.bank import DeltaBank
from trace_dist.config import RunConfig
from trace_dist.continual.driver import run_continual
from trace_dist.continual.judge import Judge, Row
from trace_dist.continual.progress import Progress, keep_trained, kept_trained
from trace_dist.continual.scored import Scored
from trace_dist.continual.setting import Setting
from trace_dist.data.batches import Batches
from trace_dist.run_folder import RunFolder
from trace_dist.train.loop import TrainResult

ROW = Row([25.0, 50.0], [75.0], [1.5])


def write_bytes(text: bytes) -> Any:
    return lambda folder: (folder / "weights").write_bytes(text)


def finished(folder: Path) -> Progress:
    """Two finished tasks."""
    progress = Progress(folder, {"model": "m"})
    progress.begin(ROW)
    for number, task in enumerate(("a", "b")):
        keep_trained(folder, task, TrainResult([(1, 0.1 + number)], [1.0], [0.25], 0.5))
        progress.finish(task, ROW, 1e-3, {"number": number}, write_bytes(b"state" * number))
    return progress


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = finished(tmp_path)
    read = Progress(tmp_path, {"model": "m"})
    assert read.record == written.record
    assert read.record.rows == [ROW] * 3
    assert read.record.facts == {"number": 1}
    assert (read.state / "weights").read_bytes() == b"state"
    assert read.trained() == [TrainResult([(1, 0.1 + number)], [1.0], [0.25], 0.5) for number in (0, 1)]
    assert kept_trained(tmp_path, "c") is None
    assert [path.name for path in tmp_path.glob("*state*")] == ["state-00002"]


@pytest.mark.parametrize("name", ["progress.json", "state-00002/weights"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_one_line(tmp_path: Path, name: str, harm: str) -> None:
    finished(tmp_path)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    if harm == "remove" and name == "progress.json":
        pytest.skip("without it nothing was finished")
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": content, "cut": content[: len(content) // 2], "remove": b""}[harm])
    if harm == "remove":
        path.unlink()
    with pytest.raises(ValueError, match=r"damaged|not valid JSON") as caught:
        assert Progress(tmp_path, {"model": "m"}).state
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", '{"version": 1}', '{"record": {}}', "[" * 100_000, "null"])
def test_what_is_no_progress_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(ValueError, match=r"progress\.json: "):
        Progress(tmp_path, {})


def test_tasks_learned_with_something_else_are_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(ValueError, match="its tasks were learned with model='m', not 'n'; set it back"):
        Progress(tmp_path, {"model": "n"})


def test_scores_of_another_base_are_dropped_where_no_task_is_finished(tmp_path: Path) -> None:
    Progress(tmp_path, {"model": "m"}).begin(ROW)
    assert Progress(tmp_path, {"model": "m"}).record.rows == [ROW]
    assert Progress(tmp_path, {"model": "n"}).record.rows == []


class Cut(Exception):
    """The process died."""


def cut_in_second_task(monkeypatch: pytest.MonkeyPatch, cfg: RunConfig) -> None:
    """Run until the first batch of the second task."""
    following, begun = Batches.__next__, []

    def mortal(self: Batches) -> Any:
        if self._consumed == 0:
            begun.append(self)
        if len(begun) == 4:  # after two pools of projections and the first task
            raise Cut
        return following(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__next__", mortal)
        with pytest.raises(Cut):
            run_continual(cfg)


def with_options(cfg: RunConfig, **options: Any) -> RunConfig:
    return replace(cfg, continual=replace(cfg.continual, methods=["merged"], options={"merged": options}))


def test_a_lower_learning_rate_goes_on_and_is_recorded(
    fresh: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_in_second_task(monkeypatch, with_options(fresh, lr=2e-2))
    run_continual(with_options(fresh, lr=1e-3))
    found = result(fresh, "merged")
    assert found["lr"] == 1e-3
    assert found["lr_by_task"] == {TASKS[0]: 2e-2, TASKS[1]: 1e-3}
    assert [len(found["losses"][task]) for task in TASKS] == [STEPS, STEPS]


def test_other_options_are_not_mixed(fresh: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_in_second_task(monkeypatch, with_options(fresh, replay=0.2))
    with pytest.raises(ValueError, match=r"progress.json: its tasks were learned with options="):
        run_continual(with_options(fresh, replay=0.3))
    run_continual(with_options(fresh, replay=0.2))
    assert not RunFolder.of(fresh.run_dir).progress("merged").exists()


def test_examples_that_were_scored_are_not_scored_again(whole: RunConfig) -> None:
    """Scores that no model gives, kept as scored: the row holds them."""
    setting = Setting.load(whole)
    bank = DeltaBank(RunFolder.of(whole.run_dir).bank().root)
    judge = Judge(whole, setting.bench)
    scored = Scored()
    row = judge.score_retrieved(setting.model, bank, scored)
    kept = Scored.from_json(json.loads(json.dumps(scored.to_json())))
    assert kept == scored
    assert judge.score_retrieved(setting.model, bank, kept) == row
    for sets in kept.examples.values():
        for scores in sets.values():
            scores.update(dict.fromkeys(scores, 0.5))
    kept.texts["text"] = 9.0
    assert judge.score_retrieved(setting.model, bank, kept) == Row([50.0, 50.0], [50.0], [9.0])


def test_an_older_state_that_cannot_be_deleted_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS, where a file of it is still open."""
    progress, rmdir = finished(tmp_path), os.rmdir

    def refusing(path: Any, **options: Any) -> None:
        if Path(os.fspath(path)).name == "state-00002":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", refusing)
    progress.finish("c", progress.record.rows[-1], None, {}, lambda folder: None)
    assert Progress(tmp_path, progress._about).record.state == "state-00003"
    monkeypatch.undo()
    progress.finish("d", progress.record.rows[-1], None, {}, lambda folder: None)
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00004"]
