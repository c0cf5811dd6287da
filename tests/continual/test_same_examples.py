"""Examples that were changed under the same path, after what was made of them was done."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from continual.small import TASKS, make_config

from trace_dist.config import RunConfig
from trace_dist.continual.same_examples import check_examples
from trace_dist.continual.setting import Setting


@pytest.fixture
def ones_own(folder: Path, tmp_path: Path) -> RunConfig:
    """A copy of the whole run over examples of its own."""
    shutil.copytree(folder / "whole", tmp_path / "run")
    cfg = make_config(folder, ["retrieved", "full"], str(tmp_path / "run"))
    sets = {}
    for name in ("tasks", "general"):
        sets[name] = [
            replace(task, path=shutil.copy(str(task.path), tmp_path)) for task in getattr(cfg, name)
        ]
    return replace(cfg, **sets)


def change(cfg: RunConfig, name: str) -> None:
    path = Path(cfg.run_dir).parent / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["prompt"] += "!"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", [TASKS[1], "plain", "text"])
def test_results_of_other_examples_are_refused(ones_own: RunConfig, name: str) -> None:
    check_examples(ones_own)
    change(ones_own, name)
    with pytest.raises(
        ValueError, match=rf"^tasks\.{name}: .*/methods/retrieved\.json was made of, .*delete .*run to"
    ):
        check_examples(ones_own)


def test_masks_and_probes_are_of_examples_too(ones_own: RunConfig) -> None:
    """Where no method has a result; a probe that was cut looks at its traces itself."""
    folder = ones_own.folder
    shutil.rmtree(folder.methods)
    change(ones_own, TASKS[0])
    for made in ("masks", "probe/traces"):
        with pytest.raises(
            ValueError, match=rf"^tasks\.{TASKS[0]}: .* {folder.root / made}/{TASKS[0]}\.safetensors was"
        ):
            check_examples(ones_own)
        shutil.rmtree(folder.root / "masks", ignore_errors=True)
    folder.specificity.unlink()
    check_examples(ones_own)


def test_a_mask_says_what_it_was_made_of(fresh: RunConfig) -> None:
    setting = Setting.load(fresh)
    one, two = (setting.mask_for(stream).meta["examples"] for stream in setting.bench.tasks)
    assert one != two


def test_results_whose_examples_are_gone_are_kept(
    ones_own: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    Path(str(ones_own.tasks[0].path)).unlink()
    with caplog.at_level(logging.WARNING):
        check_examples(ones_own)
    assert "examples cannot be read any more" in caplog.text
