"""How stages are started."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trace_dist.config.checks import Section, check
from trace_dist.parts import METHODS


@dataclass(frozen=True)
class LaunchConfig(Section):
    """How `trace-dist run` starts the distributed stages."""

    section: ClassVar[str] = "launch"

    launcher: Literal["none", "deepspeed", "torchrun", "accelerate"] = "none"
    """Program that starts the ranks; none runs in this process."""
    num_ranks: int = 1
    """Ranks on this machine."""
    parallel_stages: int = 1
    """Independent single-process stages that may run at the same time."""
    single_process: list[str] = field(default_factory=list)
    """Methods that could run on all ranks but shall run in one process each, beside those that always do."""

    def check(self) -> None:
        self.at_least(1, "num_ranks", "parallel_stages")
        startable = self.launcher != "none" or self.num_ranks == 1
        cure = "set launch.launcher to deepspeed, torchrun or accelerate"
        check(startable, "launch.num_ranks", self.num_ranks, "needs a launcher", cure)
        for name in self.single_process:
            METHODS.check(name)
