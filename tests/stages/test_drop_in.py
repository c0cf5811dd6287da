"""A score and a placement of somebody's own: a module on the path, named in the configuration, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from cli.program import make_config, write_config, write_tasks

from trace_dist.cli.parser import parse, run_config
from trace_dist.config import ProbeConfig, ProjectionConfig, RunConfig
from trace_dist.masks import Mask
from trace_dist.stages.probe import run_probe
from trace_dist.stages.project import run_project
from trace_dist.stages.start import check_parts

SCORE = '''
label = "first elements"


def energy(evidence):
    """Earlier elements count more, whatever the task."""
    update = evidence.update
    return -update.new_tensor(range(update.numel())).double().view_as(update).log1p() + 100
'''
PLACEMENT = """
from dataclasses import dataclass

label = "every other unit"


@dataclass(frozen=True)
class Options:
    offset: int = 0


def check_mask(options, mask):
    if mask.density > 0.5:
        raise ValueError(f"mask.density={mask.density}: every other unit is a half at most; lower it")


def scores(site, options):
    import torch

    return lambda name, layout: (torch.arange(layout.num_units) % 2 == options.offset).float()
"""


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose score and placement are modules of a folder on the path."""
    folder = tmp_path_factory.mktemp("dropped")
    (folder / "dropped").mkdir()
    (folder / "dropped" / "early.py").write_text(SCORE)
    (folder / "dropped" / "other.py").write_text(PLACEMENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.syspath_prepend(folder)
        write_tasks(folder)
        config = make_config(folder)
        config["probe"]["score"] = "dropped.early"
        config["projection"] = {"placement": "dropped.other", "options": {"offset": 1}}
        cfg = run_config(parse(["probe", "--config", str(write_config(folder, config))])["probe"])
        check_parts(cfg)
        run_probe(cfg)
        run_project(cfg)
    return cfg


def test_the_score_chooses(cfg: RunConfig) -> None:
    """The proxy's mask is the beginning of every tensor: the same share of elements of equal position."""
    mask = Mask.load(cfg.folder.proxy_mask("copy"))
    assert mask.meta["method"] == "dropped.early"
    assert mask.num_entries == pytest.approx(cfg.mask.density * mask.num_maskable, abs=1)
    for units in mask.units.values():
        assert torch.equal(units.long(), torch.arange(len(units)))


def test_the_placement_chooses_and_reads_its_options(cfg: RunConfig) -> None:
    mask = Mask.load(cfg.folder.mask("copy"))
    assert mask.meta["method"] == "projected/dropped.other"
    assert mask.num_entries == pytest.approx(cfg.mask.density * mask.num_maskable, abs=1)
    for units in mask.units.values():
        assert bool((units % 2 == 1).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection": ProjectionConfig("dropped.other", {"ofset": 1})}, "'ofset' is not an option; its options are offset"),
        ({"projection": ProjectionConfig("dropped.other", {"offset": "one"})}, 'key "offset": Expected a <class \'int\'>'),
        ({"projection": ProjectionConfig("dropped.absent")}, "projection.placement='dropped.absent': cannot be imported"),
        ({"probe": ProbeConfig(score="dropped.absent")}, "probe.score='dropped.absent': cannot be imported"),
        ({"mask": 0.6}, "mask.density=0.6: every other unit is a half at most"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_work(
    changes: dict, message: str, cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(cfg.run_dir).parent)
    if "mask" in changes:
        changes = {"mask": replace(cfg.mask, density=changes["mask"])}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_parts(replace(cfg, **changes))
    assert "\n" not in str(caught.value)
