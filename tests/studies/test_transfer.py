"""The study of composition: what it counts, its table, and all of it in little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from trace_dist.bank.bank import DeltaBank
from trace_dist.benchmarks.document import render
from trace_dist.studies.transfer import ARMS, Plan, run_study
from trace_dist.studies.transfer_page import SECTIONS, draw, summary_table
from trace_dist.studies.transfer_summary import compared, steps_to, summary
from trace_dist.utils.files import read_json, write_json

ROOT = Path(__file__).parents[2]


def record(
    arm: str, looks: list[list[float]], loss: float, seed: int = 0, used: bool = True
) -> dict[str, Any]:
    before = 0 if arm == "base" else 20
    about = {"seed": seed, "task": "new", "group": "related", "arm": arm, "steps": int(looks[-1][0])}
    return about | {
        "fit_steps": before,
        "looks": looks,
        "test_loss": loss,
        "composition": {"used": used} if before else {},
    }


def test_steps_to_a_loss_count_those_before_training() -> None:
    base = record("base", [[5, 2.0], [10, 0.9], [15, 1.1], [20, 1.0]], 1.0)
    composed = record("composed", [[5, 1.5], [10, 1.0], [15, 0.5], [20, 0.4]], 0.5)
    half = record("half", [[5, 1.2], [10, 1.1]], 1.25)
    assert steps_to(base["looks"], 1.0) == 10
    found = compared(base, composed, half)
    assert (found["base_steps"], found["composed_steps"], found["share"]) == (10, 30, 3.0)
    assert (found["reached"], found["used"]) == (True, True)
    assert (found["composed_above"], found["half_above"]) == (-50.0, 25.0)
    # A loss that is not reached takes all steps; unrelated tasks have no arm of half of the steps.
    never = compared(base, record("composed", [[5, 2.0], [20, 1.01]], 1.0, used=False))
    assert (never["composed_steps"], never["reached"], never["used"]) == (40, False, False)
    assert "half_loss" not in never


def test_intervals_are_over_seeds() -> None:
    records = []
    for seed, last in enumerate((0.5, 0.6, 0.9)):
        records += [
            record("base", [[10, 2.0], [20, 1.0]], 1.0, seed),
            record("composed", [[10, 0.9], [20, 0.8]], last, seed),
            record("half", [[10, 1.0]], 1.0, seed),
        ]
    # One that lacks the arm that it is compared with does not count.
    records.append(record("base", [[10, 2.0]], 1.0, 7))
    found = summary(records)["related"]["all"]
    expected = stats.ttest_1samp([-50, -40, -10], 0).confidence_interval(0.95)
    assert found["composed_above"] == pytest.approx([-100 / 3, expected.low, expected.high])
    assert (found["trainings"], found["seeds"], found["reached"]) == (3, 3, 3)


def test_a_plan_names_each_task_once(tmp_path: Path) -> None:
    value = yaml.safe_load((ROOT / "configs/transfer.yaml").read_text())
    assert Plan.read(ROOT / "configs/transfer.yaml").earlier == tuple(value["earlier"])
    value["related"].append("reverse")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(value))
    with pytest.raises(
        ValueError, match=r"^run.tasks=.*earlier, related and unrelated must name each of them once"
    ):
        Plan.read(tmp_path / "plan.yaml")


def test_a_study_in_little_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    def task(name: str, low: int) -> dict[str, Any]:
        words = {"dataset": "spell_backward", "min_word_len": low, "max_word_len": low + 1}
        return {"name": name, "num_train": 60, "num_test": 20, "num_validation": 10, "reasoning_gym": words}

    tiny = {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 1,
        "intermediate_size": 16,
        "steps": 2,
        "batch_size": 8,
    }
    train = {"steps": 12, "lr": 0.01, "batch_size": 8, "micro_batch_size": 8, "eval_every": 2, "keep": "last"}
    composition = {"steps": 2, "trial_steps": 3, "batch_size": 4, "least_gain": 0.0}
    bank = {"layer": 0, "keep_prompts": 0, "num_prompts": 12, "composition_options": composition}
    run = {
        "run_dir": str(tmp_path / "run"),
        "target": {"path": str(tmp_path / "run/target"), "tiny": tiny},
        "tasks": [task("old", 3), task("like", 5), task("other", 7)],
        "general": [task("any", 9)],
        "mask": {"density": 0.2, "isolation": "exclusive"},
        "train": train | {"checkpoint_every": 0, "warmup_steps": 1, "trackers": []},
        "bank": bank,
    }
    value = {"earlier": ["old"], "related": ["like"], "unrelated": ["other"], "run": run}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(value))
    plan, out = Plan.read(tmp_path / "plan.yaml"), tmp_path / "out.json"
    whole = run_study(plan, [0], out)
    assert [(each["task"], each["arm"]) for each in whole["records"]] == [
        *(("like", arm) for arm in ARMS["related"]),
        *(("other", arm) for arm in ARMS["unrelated"]),
    ]
    # Fit and trial read 4 (2 + 3 + 3) examples, which are 4 steps of 8; without a trial the fit's 8, which are one.
    assert [each["steps"] for each in whole["records"]] == [12, 12, 2, 12, 12]
    tried = ["trial" in each["composition"] for each in whole["records"]]
    expected = [4 if each else 1 for each in tried]
    assert [each["fit_steps"] for each in whole["records"]] == [0, *expected[1:3], 0, expected[4]]
    assert [step for step, _ in whole["records"][0]["looks"]] == [2, 4, 6, 8, 10, 12]
    assert DeltaBank(tmp_path / "run/seed0/bank_earlier").tasks == ["old"]
    draw(whole, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "| like |" in summary_table(whole)
    # As if it had been cut before the last training: that one alone is done again, with the same outcome.
    cut = read_json(out) | {"records": whole["records"][:-1]}
    write_json(out, cut)
    again = run_study(plan, [0], out)
    for each in (*whole["records"], *again["records"]):
        del each["seconds"]
    assert again["records"] == whole["records"]


def test_the_page_shows_the_committed_results() -> None:
    page = (ROOT / "docs/transfer.md").read_text(encoding="utf-8")
    assert render(page, ROOT / "docs/results", SECTIONS) == page
