"""Which learning rate a cell tries next.

[Note: rates] Every arm's rate is found by one rule, on a grid of half decades, over trainings of full length: from a first rate
uphill until both neighbours of the best one were tried and are worse. So no arm ends at the edge of a grid. Rates are compared on
held-out training examples; test examples are scored where a rate is the best so far.

The first rate is predicted. Adam moves each entry by about the rate, so a step changes the loss, to first order, by rate times
the sum of the absolute mean gradients over the entries. Best rates of masks were seen to keep that product within one decade
while the rates themselves spanned three. The product starts as the configuration says and is fitted on the study's first two
tasks (geometric mean over the cells that are tuned there); later tasks check it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from trace_dist.studies.records import Cell, Records

HALF_DECADES = 2
"""Rates of the grid per factor of ten."""
FITTED_ON = 2
"""First tasks on which the product is fitted."""


def on_grid(lr: float) -> float:
    """The nearest rate of the grid."""
    return _rate(round(HALF_DECADES * math.log10(lr)))


def _rate(place: int) -> float:
    return float(f"{10 ** (place / HALF_DECADES):.3g}")


def _place(lr: float) -> int:
    return round(HALF_DECADES * math.log10(lr))


def next_rate(tried: Mapping[float, float], first: float, most: int) -> float | None:
    """The rate to try next, None where the best one lies between two that were tried, or as many were tried as may be.

    Args:
        tried: rate of the grid -> loss, infinite where training diverged.
        first: where to begin.
        most: rates that may be tried.
    """
    losses = {_place(lr): loss for lr, loss in tried.items()}
    if not losses:
        return on_grid(first)
    if len(losses) >= most:
        return None
    if all(math.isinf(loss) for loss in losses.values()):
        return _rate(min(losses) - 2)
    best = min(losses, key=lambda place: (losses[place], place))
    return next((_rate(place) for place in (best + 1, best - 1) if place not in losses), None)


def is_bracketed(tried: Mapping[float, float]) -> bool:
    """Whether both neighbours of the best rate were tried."""
    return bool(tried) and next_rate(tried, 1.0, len(tried) + 1) is None


def tried_in(records: Records, cell: Cell) -> dict[float, float]:
    """The rates that were tried for a cell."""
    return {trial.lr: trial.validation for trial in records.of(cell)}


def product(records: Records, cell: Cell, lr: float) -> float | None:
    """Rate times the sum of the absolute mean gradients at a cell's entries; None for an arm without a mask."""
    made = records.masks.get((cell.arm, cell.task, 0))
    return None if made is None else lr * made["gradient_sum"][density_key(cell.density)]


def fitted_product(records: Records, tasks: Sequence[str], start: float) -> tuple[float, int]:
    """Geometric mean of the products at the best rates on the first tasks, and of how many cells; else ``start``."""
    logs = []
    for cell in records.trials:
        best = records.best(cell)
        if cell.task in tasks[:FITTED_ON] and best is not None and is_bracketed(tried_in(records, cell)):
            found = product(records, cell, best.lr)
            logs += [] if not found else [math.log(found)]
    return (math.exp(sum(logs) / len(logs)), len(logs)) if logs else (start, 0)


def first_rate(
    records: Records, cell: Cell, tasks: Sequence[str], start: float, usual: Mapping[str, float]
) -> float:
    """Where the search of a cell begins: by the rule, or, for an arm without a mask, where its last task ended."""
    of_one = product(records, cell, 1.0)
    if of_one:
        return fitted_product(records, tasks, start)[0] / of_one
    before = [
        best.lr
        for task in tasks
        if task != cell.task and (best := records.best(Cell(cell.arm, task, cell.density))) is not None
    ]
    return before[-1] if before else usual.get(cell.arm, 1e-3)


def density_key(density: float | None) -> str:
    """A density as a key of JSON."""
    return "own" if density is None else f"{density:g}"
