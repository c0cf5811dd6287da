"""A run that validates: its methods leave their best looks, its race compares by them, and its results tell of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from continual.small import STEPS, TASKS, make_config, result

from trace_dist.bank.bank import DeltaBank
from trace_dist.config import RunConfig
from trace_dist.continual import driver, race
from trace_dist.continual.driver import run_continual
from trace_dist.continual.methods.joint import Joint
from trace_dist.continual.progress import examples_digest
from trace_dist.continual.setting import Setting
from trace_dist.data.examples import prompt_key
from trace_dist.stages.preview import preview

METHODS = ("retrieved", "lora")


@pytest.fixture
def validating(folder: Path, request: pytest.FixtureRequest) -> RunConfig:
    """A probed run of two methods, with looks every 5 of 12 steps."""
    run = request.node.name.replace("[", "-").rstrip("]")
    shutil.copytree(folder / "probed", folder / run)
    cfg = make_config(folder, METHODS, run)
    return replace(cfg, train=replace(cfg.train, eval_every=5, patience=3, eval_by="metric"))


def test_results_and_bank_tell_of_the_looks(validating: RunConfig) -> None:
    run_continual(validating)
    bank = DeltaBank(validating.bank_of().root)
    for method in METHODS:
        found = result(validating, method)
        assert list(found["validation"]) == list(TASKS)
        for task in TASKS:
            looks = found["validation"][task]
            assert [step for step, _, _ in looks] == [5, 10, STEPS][: len(looks)]
            best = max(looks, key=lambda look: (look[2], -look[1], -look[0]))
            assert found["kept_steps"][task] == best[0]
            assert found["losses"][task][-1][0] == looks[-1][0]
            if method == "retrieved":
                assert bank.facts(task)["training"]["kept_step"] == best[0]


def test_validation_examples_are_part_of_what_a_run_is_made_with(validating: RunConfig) -> None:
    setting = Setting.load(validating)
    plain = Setting.load(
        replace(validating, train=replace(validating.train, eval_every=0, patience=None, eval_by="loss"))
    )
    for stream, other in zip(setting.bench.tasks, plain.bench.tasks, strict=True):
        assert stream.validation is not None
        assert other.validation is None
        trained = set(map(prompt_key, stream.task.train["prompt"][:]))
        assert not trained & set(map(prompt_key, stream.task.validation["prompt"][:]))
        assert len(stream.encoded) + len(stream.validation) == len(other.encoded)
    assert examples_digest(setting.bench.tasks) != examples_digest(plain.bench.tasks)
    # The race trains on all that is trained, and compares by what is validated.
    stream = setting.bench.tasks[0]
    part, heldout = race.split(stream, validating.race, validating.seed)
    assert part.encoded is stream.encoded
    assert heldout.encoded is stream.validation
    # Joint training is looked at on all tasks that it learns.
    joint = Joint("joint", setting, None)
    assert joint.validated(setting.bench.tasks[1]) == setting.bench.tasks
    score = setting.validation(setting.bench.tasks, lambda task: float(len(task.test))).score
    sizes = [len(each.validation) for each in setting.bench.tasks]
    assert score is not None
    assert score() == sum(sizes) / 2


def test_a_dry_run_counts_the_looks(validating: RunConfig) -> None:
    found = {work.name: work.detail for work in preview(validating).work}
    assert found["retrieved: validate one"].startswith("3 looks at ")


def test_what_reads_no_labels_says_that_it_does_not_look(
    folder: Path, validating: RunConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver.logger.parent, "propagate", True)
    cfg = replace(validating, tasks=validating.tasks[:1])
    options = {**cfg.continual.options, "consolidated": {"prompts": 20, "top": 4, "steps": 2}}
    cfg = replace(
        cfg, continual=replace(cfg.continual, methods=["retrieved", "consolidated"], options=options)
    )
    with caplog.at_level("INFO"):
        run_continual(cfg)
    assert "consolidated: reads no labels, so it looks at no validation examples" in caplog.text
    assert "validation" not in result(cfg, "consolidated")
