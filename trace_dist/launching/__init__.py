"""How a command is started as a process of its own: alone, on the ranks of this machine, or on several hosts."""

from trace_dist.launching.commands import free_port, launch_command, shown_launch
from trace_dist.launching.environment import (
    RUN_HOST,
    RUN_PID,
    ProcessFailed,
    alone_environment,
    followed,
    launch_environment,
    ranks_environment,
    run_holders,
    run_process,
)

__all__ = [
    "RUN_HOST",
    "RUN_PID",
    "ProcessFailed",
    "alone_environment",
    "followed",
    "free_port",
    "launch_command",
    "launch_environment",
    "ranks_environment",
    "run_holders",
    "run_process",
    "shown_launch",
]
