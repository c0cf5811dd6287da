"""What a study does next, from its records alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trace_dist.studies.plan import StageConfig, StudyConfig
from trace_dist.studies.rates import fitted_product, is_bracketed, next_rate, on_grid
from trace_dist.studies.records import Cell, Journal, Records
from trace_dist.studies.schedule import Job, Make, Schedule, ScoreBase, Train, Traits
from trace_dist.studies.summary import MARGIN, _difference, _enough, is_undecided, summarise

TRAITS = {"random": Traits(True, True), "probed": Traits(True, True), "lora": Traits(False, False)}


def study(**changes: Any) -> StudyConfig:
    stages = [StageConfig(["random", "probed", "lora"], [1e-3, 1e-2])]
    return StudyConfig(**{"stages": stages, "first_rates": {"lora": 1e-2}} | changes)


def schedule(plan: StudyConfig, undecided: bool = True) -> Schedule:
    return Schedule(plan, ["one", "two", "three"], TRAITS, lambda *_: undecided)


def do(job: Job, records: Records, bowl: float = 1e-2) -> None:
    """A training whose loss is least at one rate, masks whose gradients sum to 700."""
    if isinstance(job, ScoreBase):
        records.add({"kind": "base", "task": job.task, "tokens": [1, 1]})
    elif isinstance(job, Make):
        sums = {f"{density:g}": 700.0 for density in (1e-3, 1e-2)}
        record = {"arm": job.arm, "task": job.task, "seed": job.seed, "gradient_sum": sums, "seconds": 1.0}
        records.add({"kind": "mask", **record})
    else:
        loss = abs(math.log10(job.lr / bowl))
        best = records.best(job.cell, job.seed)
        asked = best is None or loss < best.validation
        shown = {"losses": [loss, loss] if asked else None, "right": [1, 0] if asked else None, "text": 1.0}
        cost = {"entries": 5, "train_flops": 1.0, "train_s": 1.0, "seconds": 1.0}
        trial = {"seed": job.seed, "lr": job.lr, "validation": loss, **shown, **cost}
        records.add({"kind": "trial", **job.cell._asdict(), **trial})


def all_of(plan: Schedule, records: Records) -> list[Job]:
    done = []
    while (job := plan.next_job(records)) is not None:
        do(job, records)
        done.append(job)
        assert len(done) < 500
    return done


def test_a_rate_climbs_until_both_neighbours_are_worse() -> None:
    tried: dict[float, float] = {}
    while (lr := next_rate(tried, 2.3e-1, 9)) is not None:
        tried[lr] = abs(math.log10(lr) + 2)
    assert list(tried) == [0.316, 1.0, 0.1, 0.0316, 0.01, 0.00316]
    assert is_bracketed(tried)
    assert not is_bracketed({0.1: 1.0, 0.316: 2.0})
    # Where all diverge, rates fall faster; where as many were tried as may be, the search ends.
    assert next_rate({1.0: math.inf}, 1.0, 9) == 0.1
    assert next_rate({1.0: 1.0, 3.16: 0.5}, 1.0, 2) is None
    assert on_grid(2e-4) == 2e-4 or on_grid(2e-4) == 0.000316


def test_first_rates_come_from_the_rule_and_the_rule_from_the_first_tasks() -> None:
    records, plan = Records(), schedule(study(rule=7.0))
    done = all_of(plan, records)
    trainings = [job for job in done if isinstance(job, Train)]
    assert isinstance(done[0], ScoreBase)
    assert isinstance(done[1], Make)
    # The rule: 7 over 700.
    assert trainings[0] == Train(Cell("random", "one", 1e-3), 0, 1e-2)
    assert {job.cell.density for job in trainings if job.cell.arm == "lora"} == {None}
    assert {len([job for job in trainings if job.cell == cell]) for cell in records.trials} == {3}
    assert fitted_product(records, plan.tasks, 1.0) == (pytest.approx(7.0), 8)
    # Masks of all densities are made at once.
    assert len([job for job in done if isinstance(job, Make)]) == 2 * 3


def test_more_seeds_only_where_it_is_undecided() -> None:
    stages = [StageConfig(["random", "probed"], [1e-2], seeds=2, undecided=True)]
    for undecided, seeds in ((True, {0, 1}), (False, {0})):
        records = Records()
        all_of(schedule(study(stages=stages), undecided), records)
        assert set(records.trials[Cell("probed", "one", 1e-2)]) == seeds
        assert set(records.trials[Cell("random", "one", 1e-2)]) == seeds
    again = records.of(Cell("probed", "one", 1e-2), 0)
    assert len(again) == 3


def test_a_study_that_was_cut_goes_on(tmp_path: Path) -> None:
    records, whole = Records(), schedule(study())
    journal = Journal(tmp_path / "records.jsonl", {"one": "a", "two": "b"})
    assert journal.read().num_trials == 0
    journal.append({"kind": "base", "task": "one", "tokens": [1]})
    with journal.path.open("a") as handle:
        handle.write('{"kind": "trial", "arm"')
    journal.append({"kind": "base", "task": "two", "tokens": [1]})
    Journal(journal.path, {"two": "other"}).append({"kind": "base", "task": "two", "tokens": [2]})
    Journal(journal.path, {"three": "c"}).append({"kind": "base", "task": "three", "tokens": [1]})
    assert {name: base["tokens"] for name, base in journal.read().bases.items()} == {"one": [1], "two": [1]}
    first = all_of(whole, records)
    assert whole.next_job(records) is None
    assert isinstance(first[-1], Train)


def test_a_record_that_was_changed_is_left_out_and_its_work_done_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "records.jsonl", {"one": "a", "two": "b"})
    for task in ("one", "two"):
        journal.append({"kind": "base", "task": task, "tokens": [1]})
    first, second = journal.path.read_bytes().splitlines(keepends=True)
    for line in (
        second.replace(b"[1]", b"[7]"),
        b"\xff" + second,
        b"[" * 5000,
        second.replace(b'"two"', b"[2]"),
    ):
        journal.path.write_bytes(first + line)
        assert list(journal.read().bases) == ["one"]
    # As an earlier release wrote them; one that lacks something is named with its file.
    journal.path.write_text('{"about": "b", "task": "two", "kind": "base", "tokens": [2]}\n')
    assert list(journal.read().bases) == ["two"]
    journal.path.write_text('{"about": "b", "task": "two", "kind": "trial"}\n')
    with pytest.raises(ValueError, match=r"records\.jsonl: corrupt study file"):
        journal.read()


def test_trainings_without_the_record_of_their_base_wait_for_it() -> None:
    """It was cut or changed; what the rest says can be summed up before it is made again."""
    stages = [StageConfig(["random", "probed"], [1e-2], seeds=2, undecided=True)]
    records, plan = Records(), study(stages=stages)
    all_of(schedule(plan), records)
    for base in records.bases.values():
        base |= {"losses": [1.0, 1.0], "right": [1, 0], "text": 1.0}
        base |= {"majority_percent": 0.0, "overlap_percent": 0.0}
    for made in records.masks.values():
        made |= {"warm_losses": [], "probe_flops": 1.0, "probe_s": 1.0}
    del records.bases["two"]
    asked = Schedule(plan, ["one", "two", "three"], TRAITS, lambda *given: is_undecided(*given, "random"))
    assert {job for _, job in asked.pending(records)} == {ScoreBase("two")}
    found = summarise(records, plan, asked.tasks)
    assert {row["task"] for row in found["differences"][0]["tasks"]} == {"one", "three"}
    assert {cell["task"] for cell in found["cells"] if not cell["seeds"]} == {"two"}


@pytest.mark.parametrize("diverged", ["probed", "random"])
def test_a_seed_that_diverges_is_not_left_out_in_silence(diverged: str) -> None:
    stages = [StageConfig(["random", "probed"], [1e-2], seeds=3)]
    records, plan = Records(), study(stages=stages)
    all_of(schedule(plan), records)
    kept = dict(records.trials)
    for arm, shift in (("random", 1.0), ("probed", 0.0)):
        cell = Cell(arm, "one", 1e-2)
        records.trials[cell] = {
            seed: [replace(trial, losses=[shift, shift]) for trial in trials]
            for seed, trials in kept[cell].items()
        }
    (row,) = _difference(records, ("probed", 1e-2), ("random", 1e-2), ["one"])
    assert row["tasks"][0]["verdict"] == "lower"
    assert row["mean"]["tasks"] == 1
    cell = Cell(diverged, "one", 1e-2)
    (lost,) = records.of(cell, 2)
    records.trials[cell][2] = [replace(lost, validation=math.inf, losses=None, right=None, text=None)]
    (row,) = _difference(records, ("probed", 1e-2), ("random", 1e-2), ["one"])
    assert [row["tasks"][0][key] for key in ("verdict", "tuned", "seeds")] == ["undecided", False, 2]
    assert row["mean"] is None


def test_the_best_density_is_enough_however_much_its_seeds_differ() -> None:
    stages = [StageConfig(["random"], [1e-3, 1e-2], seeds=3)]
    records = Records()
    plan = study(stages=stages)
    all_of(schedule(plan), records)
    for cell, seeds in records.trials.items():
        shift = 0.5 if cell.density == 1e-3 else 0.0
        records.trials[cell] = {
            seed: [replace(trial, losses=[shift + seed, shift + seed]) for trial in trials]
            for seed, trials in seeds.items()
        }
    found = list(_enough(records, plan, ["one"]))
    assert found == [{"arm": "random", "task": "one", "density": 1e-2, "margin": MARGIN}]


def test_wrong_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"study.stages.arms='guess'"):
        StageConfig(["guess"], [0.1])
    with pytest.raises(ValueError, match=r"study.stages.densities=\[2.0\]"):
        StageConfig(["random"], [2.0])
    with pytest.raises(ValueError, match=r"study.max_rates=2: must be at least 3"):
        study(max_rates=2)
