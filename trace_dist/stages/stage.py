"""A stage, seen from outside: one command of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_dist.utils.files import read_json, reading

ALONE = [
    *("--backend", "single", "--launch.launcher", "none", "--launch.num_ranks", "1"),
    *("--launch.hostfile", "null", "--train.sequence_parallel", "1"),
]
"""Arguments of a command that runs in one process, whatever the configuration says of the others."""


@dataclass(frozen=True)
class Stage:
    """One command of a run.

    Attributes:
        name: for logs and timings.
        arguments: what follows ``trace-dist``, without the config.
        outputs: files that are there when the stage is done.
        inputs: files that must be there before -> the command that writes them.
        launched: whether it starts under the launcher.
    """

    name: str
    arguments: list[str]
    outputs: list[Path]
    inputs: Mapping[Path, str] = field(default_factory=dict)
    launched: bool = False

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return all(path.exists() for path in self.outputs)

    @property
    def made_before(self) -> bool:
        """Whether it has files to make, and all are there."""
        return bool(self.outputs) and self.done

    def check_inputs(self) -> None:
        """Raise ``ValueError`` where an earlier stage has not run."""
        for path, command in self.inputs.items():
            if not path.is_file():
                raise ValueError(f"{path}: is not there yet; start `trace-dist {command}` first")


def read_timings(path: Path) -> dict[str, Any]:
    """Wall time of the stages of a run so far: ``stages`` (name -> seconds) and ``wall_seconds``.

    Raises:
        ValueError: the file is missing or damaged.
    """
    found = read_json(path)
    with reading(path, "timings"):
        stages = {name: float(seconds) for name, seconds in found["stages"].items()}
        return {"stages": stages, "wall_seconds": float(found["wall_seconds"])}
