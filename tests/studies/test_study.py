"""A study on tiny models, end to end: every arm, a cut, the page."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from studies.small import DENSITIES, Setup

from trace_dist.benchmarks.document import render
from trace_dist.config import (
    TrainConfig,
)
from trace_dist.parts import ARMS
from trace_dist.studies import small_to_large
from trace_dist.studies.arm import Masked, load_arm
from trace_dist.studies.claims import FOR, UNDECIDED, claims
from trace_dist.studies.heldout import HeldOut
from trace_dist.studies.lab import Case, Lab
from trace_dist.studies.meter import Meter
from trace_dist.studies.page import PAGES, RESULT, draw, sections_of
from trace_dist.studies.picture import at_first_density, look
from trace_dist.studies.plan import StageConfig
from trace_dist.studies.probes import Probes
from trace_dist.studies.records import Cell, Journal, Records
from trace_dist.studies.schedule import ScoreBase, Train
from trace_dist.studies.settings import abouts, chosen
from trace_dist.studies.small_to_large import Stopped, run_study
from trace_dist.utils import locks

DOCS = Path(__file__).parents[2] / "docs"


def weights(lab: Lab) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lab.model.module.state_dict().items()}


def test_every_arm_trains_and_puts_the_target_back(setup: Setup) -> None:
    stage = [StageConfig(list(ARMS), DENSITIES)]
    lab = Lab(setup.cfg, replace(setup.study, stages=stage))
    before, case, masks, probes = weights(lab), Case("first", 0), {}, Probes(lab)
    for name in ARMS:
        arm = load_arm(name, lab, probes)
        density = DENSITIES[1] if arm.by_density else None
        if isinstance(arm, Masked):
            made = arm.make(case)
            masks[name] = arm.mask(case, density)
            assert made["entries"].keys() == made["gradient_sum"].keys()
            assert min(made["gradient_sum"].values()) > 0
            assert (made["learning"] is not None) == arm.reads_proxy, name
            assert (made["probe_flops"] > 0) == (name != "random"), name
            if arm.by_density:
                for each in DENSITIES:
                    assert arm.mask(case, each).density == pytest.approx(each, abs=2e-3), name
        spent = lab.meter.flops
        base = lab.validate(lab.base(), "first")
        with arm.trial(case, density, 3e-2) as learner:
            found = lab.validate(learner, "first")
            assert found.nats != base.nats, name
        assert arm.entries(case, density) > 0
        assert lab.meter.flops > spent
        assert all(torch.equal(value, before[key]) for key, value in weights(lab).items()), name
        assert not any(parameter.requires_grad for parameter in lab.model.module.parameters())
    digests = {name: mask.digest() for name, mask in masks.items()}
    assert len(set(digests.values())) == len(digests)
    evenly, free = (
        [len(masks[name].units.get(each, ())) / layout.numel for each, layout in lab.layouts.items()]
        for name in ("probed_evenly", "probed")
    )
    # What rounding leaves of one tensor goes to the next.
    assert max(evenly) - min(evenly) < 1.5 / min(layout.numel for layout in lab.layouts.values())
    assert max(free) - min(free) > 4 * (max(evenly) - min(evenly))


def test_held_out_answers_are_those_of_greedy_decoding(setup: Setup) -> None:
    from trace_dist.evaluation import evaluate_task

    lab = Lab(setup.cfg, setup.study)
    arm = load_arm("full", lab, Probes(lab))
    with arm.trial(Case("first", 0), None, 3e-3) as learner:
        found = lab.test(learner, "first")
        task = lab.setting.bench.tasks[0].task
        score = evaluate_task(
            learner.module, lab.setting.bench.tokenizer, task, setup.cfg.eval, setup.cfg.data
        )
    assert [float(each) for each in found.right] == score.per_example
    assert len(found.nats) == 12
    assert min(found.nats) > 0


def test_a_study_its_cut_and_its_page(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, job: Any, done: list[int] = []) -> None:  # noqa: B006
        done.append(1)
        if len(done) == 9:
            raise Stopped
        real(self, job)

    real, records = small_to_large.Worker.do, tmp_path / "kept" / "records.jsonl"
    study = replace(setup.study, records=str(records))
    with monkeypatch.context() as patch:
        patch.setattr(small_to_large.Worker, "do", stop)
        cut = run_study(setup.cfg, study)
    assert not cut["complete"]
    locks.release()
    # Somebody goes on with the records alone: masks that were recorded are made again.
    shutil.rmtree(setup.cfg.run_dir)
    known = records.read_text()
    begun = run_study(setup.cfg, study)
    assert records.read_text().startswith(known)
    assert begun["complete"]
    assert begun["trainings"] > cut["trainings"] > 0
    assert list(begun["bases"]) == ["first", "last"]
    cells = {(cell["arm"], cell["task"], cell["density"]): cell for cell in begun["cells"]}
    assert len(cells) == 2 * (3 * 2 + 1)
    assert cells["lora", "first", None]["entries"] > 0
    assert {len(cell["rates"]) for cell in begun["cells"]} <= {2, 3}
    assert {cell["seeds"] for key, cell in cells.items() if key[0] == "random"} == {1}
    locks.release()
    # A complete study loads nothing.
    monkeypatch.setattr(
        small_to_large.Worker, "lab", property(lambda _: pytest.fail("the models were loaded"))
    )
    # What trained is named, not what sums up.
    monkeypatch.setattr(small_to_large, "meta_info", lambda: begun["meta_info"] | {"hardware": "another one"})
    again = json.loads(json.dumps(run_study(setup.cfg, study)))
    assert again["meta_info"] == begun["meta_info"]
    assert again["cells"] == begun["cells"]
    assert again["differences"] == begun["differences"]
    for section, (_, table) in sections_of(RESULT).items():
        assert "random" in table(again) or section in ("progress", "costs", "claims", "enough"), section
    assert {claim.verdict for claim in claims(again)} <= {FOR, "against", UNDECIDED}
    shown = at_first_density(again)
    assert {each["other"] for each in shown} == {"random"}
    assert len({(each["density"], each["other_density"]) for each in shown}) == 1 < len(again["differences"])
    draw(again, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_no_two_arms_look_alike() -> None:
    """There are more of them than colours."""
    arms = {name: {"colour": ARMS.load(name).ARM.colour} for name in ARMS}
    looks = {tuple(look({"arms": arms}, name).values()) for name in arms}
    assert len(looks) == len(arms) > len({arm["colour"] for arm in arms.values()})


@pytest.mark.parametrize("at", ["test", "text"])
def test_losses_that_are_none_are_kept_as_a_training_that_diverged(
    setup: Setup, tmp_path: Path, at: str
) -> None:
    """Also where the held-out loss, which is looked at first, is one. Without a loss of the base nothing can be compared."""
    losses = {"test": 1.0, "text": 2.0, at: math.nan}

    def said(loss: float) -> Any:
        return lambda *_: HeldOut([loss], [True], [1])

    ends = contextlib.nullcontext()
    lab = SimpleNamespace(meter=Meter(), base=lambda: None, validate=said(0.5))
    lab.test, lab.text = said(losses["test"]), said(losses["text"])
    journal = Journal(tmp_path / "records.jsonl", {"first": "a"})
    worker = small_to_large.Worker(setup.cfg, setup.study, journal, Records())
    vars(worker)["_lab"] = lab
    vars(worker)["_arm"] = lambda _: SimpleNamespace(trial=lambda *_: ends, entries=lambda *_: 3)
    worker.do(Train(Cell("lora", "first", None), 0, 1e-3))
    (trial,) = journal.read().of(Cell("lora", "first", None))
    assert (trial.validation, trial.losses, trial.text) == (math.inf, None, None)
    with pytest.raises(ValueError, match=r"^tasks\.first: loss=nan: the base has such a loss; use another"):
        worker.do(ScoreBase("first"))
    assert not journal.read().bases


def test_processes_share_a_study(setup: Setup, tmp_path: Path) -> None:
    """Each works on tasks of its own; the last one's summary knows what all have done. No two work on one task."""
    locks.release()
    cfg = replace(setup.cfg, run_dir=str(tmp_path / "run"))
    stage, out = StageConfig(["random"], DENSITIES[1:]), str(tmp_path / RESULT)
    study = replace(setup.study, stages=[stage], records=str(tmp_path / "records.jsonl"), out=out)
    one = run_study(cfg, study, only=["last"])
    assert (list(one["bases"]), one["complete"]) == (["last"], False)
    locks.release()
    with (tmp_path / "run" / ".lock.last").open("w") as held:
        print("somebody", end="", file=held, flush=True)
        fcntl.flock(held, fcntl.LOCK_EX)
        for tasks in (None, ["last"]):
            with pytest.raises(ValueError, match="only='last': somebody is at work in it"):
                run_study(cfg, study, only=tasks)
    locks.release()
    both = run_study(cfg, study, only=["first", "first"])
    assert (list(both["bases"]), both["complete"]) == (["first", "last"], True)
    locks.release()
    assert run_study(cfg, study)["cells"] == both["cells"]
    with pytest.raises(
        ValueError, match="only='missing': the study has no such task; choose among first, last"
    ):
        run_study(cfg, study, only=["first", "missing"])
    locks.release()


def test_random_masks_differ_between_tasks_and_seeds(setup: Setup) -> None:
    lab = Lab(setup.cfg, setup.study)
    arm = cast(Masked, load_arm("random", lab, Probes(lab)))
    first, *others = (arm.masks(Case(*case)) for case in (("first", 0), ("last", 0), ("first", 1)))
    for density, mask in first.items():
        assert mask == arm.masks(Case("first", 0))[density]
        for other in others:
            assert mask.num_entries == other[density].num_entries
            assert (mask & other[density]).num_entries < 0.5 * mask.num_entries


def test_records_of_other_settings_are_left_out(setup: Setup) -> None:
    other = replace(setup.cfg, train=replace(setup.cfg.train, steps=5))
    assert abouts(other, setup.study) != abouts(setup.cfg, setup.study)
    stages = replace(setup.study, stages=[*setup.study.stages, *setup.study.stages], max_rates=9)
    assert abouts(setup.cfg, stages) == abouts(setup.cfg, setup.study)
    assert abouts(setup.cfg, replace(setup.study, plain=True)) != abouts(setup.cfg, setup.study)
    # What is a default is no part: an option that a later version adds orphans no records.
    assert chosen(TrainConfig(steps=5, betas=(0.9, 0.98))) == {"steps": 5}
    moved = replace(setup.cfg, run_dir="elsewhere")
    assert abouts(moved, setup.study) == abouts(setup.cfg, setup.study)
    # Another task changes nothing about the first one.
    more = replace(setup.cfg, tasks=[*setup.cfg.tasks, replace(setup.cfg.tasks[0], name="more", num_test=5)])
    assert abouts(more, setup.study)["first"] == abouts(setup.cfg, setup.study)["first"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_the_committed_results(name: str) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    assert render(page, DOCS / "results", PAGES[name][1]) == page
