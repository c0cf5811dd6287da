"""A stream of classes that is cut goes on, whatever the method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from continual.cuts import FROZEN, cut_at_every_border
from continual.small import OF_THE_CLOCK
from modality.small import CLASSES, make_config

from trace_dist.config import RunConfig
from trace_dist.continual.driver import check_methods, run_continual
from trace_dist.continual.judge import Judge
from trace_dist.continual.setting import Setting
from trace_dist.data.tasks import Task
from trace_dist.evaluation import Score


@pytest.mark.parametrize("name", [*FROZEN, "lora_retrieved"])
def test_it_ends_as_the_uncut_one(run: RunConfig, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(run.run_dir).parent
    cut = make_config(folder, [name], f"cut-{name}")
    # Adapters are retrieved by the bank's signatures.
    shutil.copytree(run.folder.root / "probe", cut.folder.root / "probe")
    cut_at_every_border(cut, monkeypatch)
    run_continual(cut)
    one, other = (json.loads(cfg.folder.method(name).read_text()) for cfg in (run, cut))
    assert {key: one[key] for key in one.keys() - OF_THE_CLOCK} == {
        key: other[key] for key in other.keys() - OF_THE_CLOCK
    }


def method_of(run: RunConfig, name: str) -> Any:
    """A method of a run of its own."""
    cfg = make_config(Path(run.run_dir).parent, [name], f"alone-{name}")
    (entry,) = check_methods(cfg)
    return entry.kind(name, Setting.load(cfg), entry.options)


def test_a_model_whose_task_is_given_answers_among_its_classes_alone(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what is retrieved does, whose bound it is."""
    made, evaluate, among = method_of(run, "separate"), Judge.evaluate, list[list[str] | None]()

    def watched(self: Judge, module: Any, task: Task) -> Score:
        among.append(task.among)
        return evaluate(self, module, task)

    monkeypatch.setattr(Judge, "evaluate", watched)
    made.learn(made.setting.bench.tasks[0])
    assert among == [sorted(CLASSES[0])]


def test_a_head_that_is_trained_whole_goes_on_from_task_to_task(run: RunConfig) -> None:
    """The adapters of each task are frozen; to begin the head anew would forget the classes before."""
    made = method_of(run, "olora")
    first, second = made.setting.bench.tasks
    made.learn(first)
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    answers = made.module.eval()(pixel_values=pixels).logits
    made.begin(second)
    torch.testing.assert_close(made.module.eval()(pixel_values=pixels).logits, answers, rtol=0, atol=1e-4)
    kept = {name: value.detach().clone() for name, value in made.kept().items()}
    made.restore(kept)
    torch.testing.assert_close(made.module.eval()(pixel_values=pixels).logits, answers, rtol=0, atol=1e-4)
