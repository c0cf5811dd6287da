"""A run under ZeRO-3 on two ranks that was cut ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from continual import race_script
from continual.rank_script import METHODS, make_masks
from continual.small import TASKS, make_config, outcome, result
from launching import launch

from trace_dist.continual.density import with_density
from trace_dist.continual.driver import check_methods
from trace_dist.continual.race import Race, held_race
from trace_dist.continual.setting import Setting
from trace_dist.masks import Mask
from trace_dist.utils.files import read_json

pytestmark = pytest.mark.launcher


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Path:
    """The runs ``ranks-whole`` and ``ranks-cut``, and ``ranks-masks``, which learns nothing."""
    for run in ("ranks-whole", "ranks-cut", "ranks-masks"):
        shutil.copytree(folder / "probed", folder / run)
    launch(Path(__file__).with_name("rank_script.py"), 2, folder, launcher="deepspeed")
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_cut_on_two_ranks(ranks: Path, method: str) -> None:
    cut, whole = make_config(ranks, [method], "ranks-cut"), make_config(ranks, [method], "ranks-whole")
    assert outcome(cut, method) == outcome(whole, method)


def test_tasks_are_learned_on_two_ranks_too(ranks: Path) -> None:
    """Dropout draws other numbers on two ranks, so the scores may differ by a few examples."""
    found = result(make_config(ranks, METHODS, "ranks-whole"), "retrieved")
    assert found["forgetting"] == 0
    assert list(found["losses"]) == list(TASKS)
    assert found["average_accuracy"] > 60


def test_whole_tensors_are_the_same_on_two_ranks(ranks: Path) -> None:
    shutil.copytree(ranks / "probed", ranks / "one-masks")
    one, two = (make_config(ranks, ["trace"], run) for run in ("one-masks", "ranks-masks"))
    make_masks(one)
    for task in TASKS:
        assert Mask.load(one.folder.mask(task, "trace")) == Mask.load(two.folder.mask(task, "trace"))


def test_a_race_on_two_ranks_is_that_of_one(folder: Path) -> None:
    """The ranks agree to the bit; the rate that changes nothing has the base's loss on any number of ranks."""
    for run in ("ranks-race", "one-race"):
        shutil.copytree(folder / "probed", folder / run)
    launch(Path(__file__).with_name("race_script.py"), 2, folder, launcher="torchrun")
    cfg = replace(make_config(folder, race_script.METHODS, "one-race"), race=race_script.RACE)
    setting = Setting.load(cfg)
    for entry in check_methods(cfg):
        method = entry.kind(entry.name, setting, entry.options)
        alone = held_race(setting, entry.name, [setting.bench.tasks[0]], method.trial)
        first, second = (read_json(folder / f"race-{entry.name}-{rank}.json") for rank in range(2))
        assert first == second
        assert first["restored"]
        found = Race.from_json(first["rates"])
        assert found.lr == first["lr"] == alone.lr == 1e-2
        assert found.losses[1e-7] == pytest.approx(alone.losses[1e-7], abs=1e-4)
        # dropout draws other numbers on two ranks
        assert found.losses[1e-2] == pytest.approx(alone.losses[1e-2], abs=0.2)
        assert found.losses[1e30] == float("inf")
    first, second = (read_json(folder / f"density-{rank}.json") for rank in range(2))
    assert first == second
    assert first["restored"]
    tried = read_json(folder / "ranks-race" / "density.json")["tried"]
    one = with_density(race_script.of_densities(setting))
    alone = read_json(one.folder.density)["tried"]
    assert [each["density"] for each in tried] == [0.1, 0.3]
    assert [each["loss"] for each in tried] == pytest.approx([each["loss"] for each in alone], abs=0.2)
