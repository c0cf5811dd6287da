"""A run that is killed at any moment and started again ends as the uninterrupted one, bit for bit, whatever the method."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from continual.small import CHECKPOINT_EVERY, METHODS, STEPS, TASKS, make_config, outcome, result
from launching import python, rank_environment

from trace_dist.run_folder import RunFolder


def moments(method: str) -> list[str]:
    """Where the lives of a method's run end, in the order in which they come."""
    first, inside = TASKS[0], CHECKPOINT_EVERY + 2
    progress, checkpoints = f"progress/{method}", f"checkpoints/{method}"
    masks = [] if method in ("full", "consolidated") else [f"replace masks/{first}.safetensors"]
    if method in ("random", "lora"):  # theirs is the code of retrieved and full
        return [f"batch {inside}", f"remove {checkpoints}/{first}", f"batch {inside}"]
    return [
        f"replace {progress}/progress.json",  # the base was scored
        *masks,
        "batch 2",  # before any checkpoint
        f"batch {inside}",
        f"rename {checkpoints}/{first}/step-{STEPS:08d}",  # the checkpoint of the last step
        f"replace {progress}/trained/{first}.json",
        *(["replace bank/bank.json"] if method == "retrieved" else []),
        f"rename {progress}/state-00001",
        f"replace {progress}/progress.json",  # the first task is finished, its checkpoints are still there
        f"remove {checkpoints}/{first}",
        "batch 1",
        f"batch {inside}",
        f"rename {progress}/state-00002",
        f"replace {progress}/progress.json",
        f"replace methods/{method}.json",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_every_moment(folder: Path, method: str) -> None:
    run = f"killed-{method}"
    shutil.copytree(folder / "probed", folder / run)
    if method == "consolidated":  # its teachers
        shutil.copytree(folder / "whole" / "bank", folder / run / "bank")
    script = Path(__file__).with_name("lives.py")
    done = subprocess.run(
        [python(), str(script), str(folder), run, method, *moments(method)],
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert outcome(make_config(folder, [method], run), method) == outcome(
        make_config(folder, [method], "whole"), method
    )
    left = RunFolder.of(folder / run)
    assert not left.progress(method).exists()
    assert not left.checkpoints(method).exists()


def test_the_runs_have_something_to_differ_in(folder: Path) -> None:
    """Tasks are learned, and forgotten where one set of weights is trained on; curves are whole."""
    cfg = make_config(folder, METHODS, "whole")
    assert result(cfg, "retrieved")["forgetting"] == 0
    assert result(cfg, "retrieved")["average_accuracy"] > 60
    assert result(cfg, "full")["forgetting"] > 20
    for method in METHODS:
        for curve in result(cfg, method)["losses"].values():
            assert [step for step, _ in curve] == list(range(1, STEPS + 1))
