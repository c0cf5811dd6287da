"""Results in a few words, for the line of a stage."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence

from trace_dist.config import RunConfig
from trace_dist.launching import shown_launch

MOST_NAMES = 4


def listed(tasks: Collection[str]) -> str:
    """The names of the tasks; how many there are where they would fill the line."""
    return ", ".join(tasks) if len(tasks) <= MOST_NAMES else f"{len(tasks)} tasks"


def next_steps(cfg: RunConfig) -> str:
    """What to do with a bank, as commands to copy."""
    paths = (cfg.folder.config, cfg.bank_of().root, cfg.target.path)
    config, bank, base = (shlex.quote(str(path)) for path in paths)
    return (
        f"next: trace-dist bank show {bank}\n"
        f"      trace-dist generate --bank {bank} --base {base} --prompt TEXT\n"
        f"      trace-dist learn --config task.yaml --bank {bank}\n"
        f"      trace-dist consolidate --config {config} --bank {bank}\n"
        f"      {shown_launch(cfg.launch)} eval --config {config} --bank_folder {bank}"
    )


def fold_steps(cfg: RunConfig, method: str) -> str:
    """What to do with the one set of weights that a bank became, as a command to copy."""
    paths = (cfg.bank_of().root, cfg.target.path, cfg.folder.product(method))
    bank, base, delta = (shlex.quote(str(path)) for path in paths)
    return f"next: trace-dist bank export {bank} --base {base} --delta {delta} --out one-model"


def fall(curves: Collection[Sequence[tuple[int, float]]]) -> str:
    """The losses of some trainings at their first and last steps, averaged over the trainings that made a step.

    Args:
        curves: (step, loss) of each training.
    """
    made = [curve for curve in curves if curve]
    if not made:
        return "no step"
    first, last = (sum(curve[at][1] for curve in made) / len(made) for at in (0, -1))
    return f"loss {first:.2f} -> {last:.2f}"
