"""``kill -9`` of a whole ``run``, at any moment: the same command goes on and ends with the same bank."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path

from cli.program import make_config, processes_with, run, write_config, write_tasks

KILLING = Path(__file__).with_name("killing")
MOMENTS = [
    "replace probe/copy.safetensors",  # the other task's probe is to come
    "replace masks/copy.safetensors",
    "rename checkpoints/retrieved/copy/step-00000002",
    "rename bank/tasks/.*",  # the delta lies in its place, and the bank does not name it
    "replace progress/retrieved/progress.json",
]


def live(folder: Path, moment: str = "") -> int:
    """Start the run, to its end or to a moment; its exit code."""
    changes = {"TEST_FOLDER": str(folder / "run"), "TEST_MOMENT": moment}
    paths = f"{KILLING}:{Path(__file__).parents[1]}"
    return run(
        "run",
        "--config",
        folder / "config.yaml",
        cache=folder / "cache",
        changes=changes | {"PYTHONPATH": paths},
    ).returncode


def prepared(folder: Path) -> Path:
    folder.mkdir()
    write_tasks(folder)
    config = make_config(folder) | {"continual": {"methods": ["retrieved"]}}
    config["train"] |= {"checkpoint_every": 2}
    config["bank"] |= {"layer": 0}
    write_config(folder, config)
    return folder


def kept(folder: Path) -> dict[str, bytes]:
    """What a run leaves: the bank's deltas, signatures and sketches, and the masks."""
    files = (path for part in ("bank", "masks") for path in (folder / "run" / part).rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_killed_in_every_stage(tmp_path: Path) -> None:
    whole, killed = prepared(tmp_path / "whole"), prepared(tmp_path / "killed")
    assert live(whole) == 0
    for moment in MOMENTS:
        assert live(killed, moment) == -signal.SIGKILL, moment
        for _ in range(100):  # its processes end with it
            if not processes_with(str(killed)):
                break
            time.sleep(0.1)
        assert not processes_with(str(killed))
    assert live(killed) == 0
    assert kept(killed) == kept(whole)
    notes = Counter((killed / "moments.txt").read_text().splitlines())
    once = Counter((whole / "moments.txt").read_text().splitlines())
    # Nothing whose result had taken its place was done again but what hangs on the moment itself.
    for event in (
        "replace probe/copy.safetensors",
        "replace masks/copy.safetensors",
        "replace bank/bank.json",
    ):
        assert notes[event] <= once[event] + 1, event
    assert notes["rename checkpoints/retrieved/copy/step-00000002"] == 1
