"""The study one-model: its orders, its intervals, a cut, its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies.small import Setup

from trace_dist.benchmarks.document import render
from trace_dist.config import ContinualConfig, RunConfig
from trace_dist.studies import one_model
from trace_dist.studies.one_model import Runs, run_study, summarise
from trace_dist.studies.one_model_page import one_model_table
from trace_dist.studies.one_model_plan import OneModelConfig, check_study, orders
from trace_dist.studies.page import PAGES
from trace_dist.utils import locks

METHODS = ["separate", "full"]
PLAN = OneModelConfig(orders=2, seeds=1, ours="full")


@pytest.fixture
def cfg(setup: Setup, tmp_path: Path) -> RunConfig:
    """Two tasks, two methods without masks."""
    first = setup.cfg.tasks[0]
    tasks = [first, replace(setup.study.local_tasks[0], num_test=9)]
    train = replace(setup.cfg.train, steps=2, checkpoint_every=None)
    methods = ContinualConfig(methods=METHODS)
    return replace(
        setup.cfg, run_dir=str(tmp_path / "run"), proxy=None, tasks=tasks, train=train, continual=methods
    )


def test_orders_differ_and_the_first_is_as_given() -> None:
    found = orders(["a", "b", "c"], 6)
    assert found[0] == ["a", "b", "c"]
    assert len(set(map(tuple, found))) == 6
    assert orders(["a", "b", "c"], 4) == found[:4]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"ours": "lora"}, r"study\.ours='lora': is none of continual\.methods="),
        ({"bound": "joint"}, r"study\.bound='joint': is none of continual\.methods="),
        ({"orders": 3}, r"study\.orders=3: 2 tasks have 2 orders; lower it, or add tasks"),
    ],
)
def test_what_cannot_be_studied_is_refused(cfg: RunConfig, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_study(cfg, replace(PLAN, **options))


def results(ours: list[list[float]], other: list[list[float]]) -> Runs:
    """One task whose examples two methods answer in several runs."""

    def result(each: list[float], label: str) -> dict[str, Any]:
        average = 100 * float(np.mean(each))
        told = {"average_accuracy": average, "forgetting": 0.0, "lr": 1e-3, "seconds": 1.0}
        text = {"bits_per_byte": {"text": [2.0, 1.9, 2.1]}, "measured": {"commit": "abc"}}
        return {**told, **text, "label": label, "per_example": {"task": each}}

    pairs = enumerate(zip(ours, other, strict=True))
    return {
        (0, seed): {"full": result(own, "ours"), "separate": result(theirs, "bound")}
        for seed, (own, theirs) in pairs
    }


def test_differences_are_paired_by_example_and_run() -> None:
    """Runs that differ much, by the same in both methods, leave no doubt; ones that differ in one method do."""
    generator = np.random.default_rng(0)
    theirs = [(generator.random(200) < share).astype(float) * 0.5 for share in (0.1, 0.9, 0.4)]
    same = [each + 0.25 for each in theirs]
    found = summarise(results([list(e) for e in same], [list(e) for e in theirs]), ["task"], PLAN)["methods"]
    above = found["separate"]["ours_above"]
    assert [above[key] for key in ("value", "low", "high")] == pytest.approx([25, 25, 25])
    assert above["verdict"] == "above"
    assert found["full"]["ours_above"] is None
    bound = float(np.mean(theirs))
    assert found["full"]["share_of_bound"] == pytest.approx(100 * (bound + 0.25) / bound)
    assert found["full"]["runs"][1]["text_rise_percent"] == pytest.approx(5)
    mixed = [theirs[1], theirs[0], theirs[2]]
    unsure = summarise(results([list(e) for e in mixed], [list(e) for e in theirs]), ["task"], PLAN)
    assert unsure["methods"]["separate"]["ours_above"]["verdict"] == "undecided"


def test_orders_of_a_seed_are_no_runs_of_their_own() -> None:
    """A method that keeps tasks apart has one result in all orders; to count it twice would make it surer than it is."""
    generator = np.random.default_rng(0)
    theirs = [(generator.random(200) < 0.5).astype(float) for _ in range(3)]
    ours = [np.clip(each + gain, 0, 2) for each, gain in zip(theirs, (0.1, 0.4, 0.2), strict=True)]
    once = results([list(e) for e in ours], [list(e) for e in theirs])
    twice = {(order, seed): found for order in range(2) for (_, seed), found in once.items()}
    above, again = (
        summarise(runs, ["task"], PLAN)["methods"]["separate"]["ours_above"] for runs in (once, twice)
    )
    assert above == again
    assert above["high"] - above["low"] > 50


def test_a_study_its_cut_and_its_page(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study_one_model_toy.json"
    plan = replace(PLAN, out=str(out))
    begun = run_study(cfg, plan, hours=0)
    locks.release()
    assert begun["missing"] == 4
    assert begun["methods"] == {}
    learn, learned = one_model._learn, list[tuple[str, str]]()

    def cut(study: RunConfig, run: RunConfig, method: str) -> None:
        if learned:
            raise one_model.Stopped
        learned.append((Path(run.run_dir).name, method))
        learn(study, run, method)

    with monkeypatch.context() as patch:
        patch.setattr(one_model, "_learn", cut)
        found = run_study(cfg, plan)
        locks.release()
    assert found["methods"] == json.loads(out.read_text())["methods"]
    assert (found["missing"], learned) == (3, [("order-0-seed-0", "separate")])
    whole = run_study(cfg, plan)
    locks.release()
    assert whole["complete"]
    first, second = (
        json.loads((Path(cfg.run_dir) / f"order-{number}-seed-0/methods/full.json").read_text())
        for number in (0, 1)
    )
    assert [run["average_accuracy"] for run in whole["methods"]["full"]["runs"]] == [
        first["average_accuracy"],
        second["average_accuracy"],
    ]
    assert list(first["per_example"]) == ["first", "last"] == list(second["per_example"])[::-1]
    assert [len(each) for each in first["per_example"].values()] == [12, 9]
    for result in (first, second):
        means = [100 * np.mean(each) for each in result["per_example"].values()]
        assert result["R"][-1] == pytest.approx(means)
    monkeypatch.setattr(one_model, "_learn", lambda *_: pytest.fail("all is there"))
    assert run_study(cfg, plan)["methods"] == whole["methods"]
    locks.release()
    own = {"one-model": PAGES["studies.md"][1]["one-model"]}
    shown = render("<!-- one-model -->\n<!-- /one-model -->\n", tmp_path, own)
    assert one_model_table(whole) in shown
    assert "| a model per task (bound) |" in shown
