"""One file makes a modality; its path is its name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trace_dist.config import DataConfig, RunConfig
from trace_dist.continual.setting import Setting
from trace_dist.masks import Mask
from trace_dist.train.workbench import Workbench

MIRRORED = '''
"""Images that are seen in a mirror, and how they are scored."""

from trace_dist.evaluation.metrics.top1 import evaluate, label
from trace_dist.modality.image import *
from trace_dist.modality.image import ImageReader, collate, nll_sum, represent, always, lora, check_size, encode, batching
from trace_dist.modality.image import load_reader as plain_reader

modality = "their.mirrored"
keeps_prompts = False


class Mirrored(ImageReader):
    def pixels(self, prompt):
        return super().pixels(prompt).flip(-1)


def load_reader(path):
    found = plain_reader(path)
    return Mirrored(found.processor, found.classes)
'''


@pytest.fixture
def mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The path of a module outside the package."""
    (tmp_path / "their").mkdir()
    (tmp_path / "their/mirrored.py").write_text(MIRRORED)
    monkeypatch.syspath_prepend(tmp_path)
    yield "their.mirrored"
    for name in ("their.mirrored", "their"):
        sys.modules.pop(name, None)


def test_one_file_makes_a_modality(run: RunConfig, mirrored: str) -> None:
    tasks = [replace(task, metric=mirrored) for task in run.tasks]
    cfg = replace(run, data=DataConfig(modality=mirrored), tasks=tasks)
    theirs, ours = (Workbench.load(each, run.target.path) for each in (cfg, run))
    seen = [
        next(bench.batches(bench.tasks[:1], 4)).micro_batches[0]["pixel_values"] for bench in (theirs, ours)
    ]
    assert torch.equal(seen[0], seen[1].flip(-1))
    setting = Setting.load(cfg)
    task = setting.bench.tasks[0].task
    assert 0 <= setting.judge.evaluate(setting.model.module, task).value <= 100
    assert setting.judge.representations(setting.model, task, 1).shape == (60, 80)


def test_rows_that_are_always_trained_must_be_maskable(run: RunConfig) -> None:
    mask = Mask.load(run.folder.mask(run.tasks[0].name))
    with pytest.raises(
        ValueError, match=r"^mask\.maskable: vit\.nothing is always trained, and must be maskable; "
    ):
        mask.with_elements({"vit.nothing": torch.tensor([0])})
    assert mask.with_elements({}) is mask
