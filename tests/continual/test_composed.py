"""Post-hoc merges of the bank: no training, one set of weights, which stays when the run is over."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from continual.small import TASKS, make_config, result

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.composition import compose
from trace_dist.bank.delta import Delta
from trace_dist.config import ContinualConfig, RunConfig
from trace_dist.continual.driver import run_continual
from trace_dist.report.results import parse_results
from trace_dist.report.tables import summary_table
from trace_dist.run_folder import RunFolder
from trace_dist.sharding.build import load_sharded
from trace_dist.stages.report import collect_results

KINDS = {"sum": None, "average": None, "ties": {"keep": 0.5}, "dare": {"drop": 0.3, "seed": 5}}


@pytest.fixture(scope="module")
def cfg(folder: Path) -> RunConfig:
    """A run of all compositions beside a bank that is full; the rate of what trains would race."""
    shutil.copytree(folder / "probed", folder / "composed")
    shutil.copytree(folder / "whole" / "bank", RunFolder.of(folder / "composed").bank().root)
    cfg = make_config(folder, list(KINDS), "composed")
    options = {name: options for name, options in KINDS.items() if options}
    cfg = replace(cfg, continual=ContinualConfig(list(KINDS), options), train=replace(cfg.train, lr="auto"))
    run_continual(cfg)
    return cfg


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_is_the_composition_of_all_tasks(cfg: RunConfig, kind: str) -> None:
    found = Delta.load(cfg.folder.product(kind))
    bank, model = DeltaBank(cfg.folder.bank().root), load_sharded(cfg.target.path, "float32")
    deltas = [delta for task in TASKS if (delta := bank.delta(task)) is not None]
    expected = compose(deltas, model, kind, kind, KINDS[kind])
    assert found.mask == expected.mask
    assert all(torch.equal(found.values[name], value) for name, value in expected.values.items())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_trained(cfg: RunConfig, kind: str) -> None:
    found = result(cfg, kind)
    assert found["lr"] is None
    assert found["rates"] == []
    assert found["losses"] == {task: [] for task in TASKS}
    assert len(found["R"]) == 1 + len(TASKS)
    if kind != "dare":  # after the first task there is one delta, and it is that task's
        assert found["R"][1][0] > found["R"][0][0]


def test_the_report_has_a_row_for_each(cfg: RunConfig) -> None:
    view = parse_results(collect_results(cfg))
    assert [method.name for method in view.methods] == list(KINDS)
    assert len(summary_table(collect_results(cfg)).rows) == len(KINDS)


def test_what_was_trained_on_one_set_of_weights_stays_too(whole: RunConfig) -> None:
    for name in ("merged", "consolidated"):
        found = Delta.load(whole.folder.product(name))
        assert found.mask.num_entries == result(whole, "consolidated")["trainable"]
    for name in ("retrieved", "random", "full", "lora"):
        assert not whole.folder.product(name).exists()
