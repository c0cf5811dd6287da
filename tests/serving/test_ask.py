"""The end of a run: its bank is asked one prompt of each of three tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from serving.small import TASKS, TINY, Small, prompts

from trace_dist.config import (
    BankConfig,
    ContinualConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    TaskConfig,
)
from trace_dist.stages.ask import ask_bank, asks
from trace_dist.stages.generate import print_answers


@pytest.fixture
def cfg(small: Small, tmp_path: Path) -> RunConfig:
    for task in TASKS[:3]:
        rows = [{"prompt": text, "answer": "a"} for text in prompts(task, 40)]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(
        target=ModelConfig(str(small.base), tiny=TINY),
        tasks=[TaskConfig(task, path=str(tmp_path / f"{task}.jsonl")) for task in TASKS[:3]],
        run_dir=str(tmp_path / "run"),
        bank=BankConfig(path=str(small.bank)),
        continual=ContinualConfig(["retrieved"]),
        eval=EvalConfig(max_new_tokens=5),
    )


def test_a_prompt_of_each_task_is_answered(
    cfg: RunConfig, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asks(cfg)
    found = ask_bank(cfg)
    assert [answer.task for _, answer in found] == list(TASKS[:3])
    for question, answer in found:
        assert answer.text == small.expected(answer.task, [str(question.prompt)], 5)[0]
    print_answers(found)
    shown = capsys.readouterr().out
    assert all(f"│ {task} " in shown for task in TASKS[:3])


def test_a_run_that_retrieves_nothing_or_is_large_asks_nothing(cfg: RunConfig, tmp_path: Path) -> None:
    assert not asks(replace(cfg, continual=ContinualConfig(["merged"])))
    assert not asks(replace(cfg, target=ModelConfig(cfg.target.path)))
    assert not asks(replace(cfg, bank=BankConfig(path=str(tmp_path / "none"))))
