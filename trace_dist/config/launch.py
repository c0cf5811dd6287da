"""How stages are started."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trace_dist.config.checks import Section, check
from trace_dist.parts import METHODS


@dataclass(frozen=True)
class LaunchConfig(Section):
    """How `trace-dist run`, `learn` and `launch` start what works on all ranks."""

    section: ClassVar[str] = "launch"

    launcher: Literal["none", "deepspeed", "torchrun", "accelerate", "slurm"] = "none"
    """Program that starts the ranks; none runs in this process, slurm is srun inside a job."""
    num_ranks: int = 1
    """Ranks in all: on this machine, on the hosts of the hostfile, or on the nodes of a Slurm job."""
    hostfile: str | None = None
    """File with a line `NAME slots=RANKS` per host, this one first; null is this machine alone."""
    parallel_stages: int = 1
    """Independent single-process stages that may run at the same time."""
    single_process: list[str] = field(default_factory=list)
    """Methods that could run on all ranks but shall run in one process each, beside those that always do."""

    silence_seconds: float = 60.0
    """A rank that gives no sign of life for so long is lost: it is named, and all others end."""
    stuck_minutes: float = 10.0
    """All ranks end where each has waited for the others for so long, and nothing moved."""
    timeout_minutes: int = 30
    """How long ranks wait for one that lives and is at work alone; a collective of GPUs waits at most 10. DEEPSPEED_TIMEOUT
    overrides both."""

    def check(self) -> None:
        self.expand("hostfile")
        self.at_least(1, "num_ranks", "parallel_stages", "silence_seconds", "timeout_minutes")
        self.positive("stuck_minutes")
        startable = self.launcher != "none" or self.num_ranks == 1
        cure = "set launch.launcher to deepspeed, torchrun, accelerate or slurm"
        check(startable, "launch.num_ranks", self.num_ranks, "needs a launcher", cure)
        others = self.hostfile is None or self.launcher in ("deepspeed", "torchrun", "accelerate")
        cure = "set launch.launcher to deepspeed, torchrun or accelerate; Slurm knows the nodes of its job"
        check(others, "launch.hostfile", self.hostfile, f"launcher {self.launcher} reads none", cure)
        for name in self.single_process:
            METHODS.check(name)
