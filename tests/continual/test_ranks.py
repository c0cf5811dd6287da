"""A run under ZeRO-3 on two ranks that was cut ends as the uninterrupted one, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from continual.rank_script import METHODS
from continual.small import TASKS, make_config, outcome, result
from launching import launch

pytestmark = pytest.mark.launcher


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Path:
    """The runs ``ranks-whole`` and ``ranks-cut``."""
    for run in ("ranks-whole", "ranks-cut"):
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
