"""Numbers of a stream of tasks, from the accuracy matrix.

[Note: the accuracy matrix] R is [T + 1, T], in percent: R[t, i] is the score on task i after training on
the t-th task, row 0 is the untouched base. Tasks count from 1 in the formulas below, so task i is *just
trained* in R[i, i] (`R[i, i - 1]` in numpy). Definitions after Lopez-Paz and Ranzato (2017, GEM, section 2)
and Chaudhry et al. (2018, section 2); "average accuracy" has two meanings in the field, so the one of the
PILOT toolbox carries its name.

With a single task there is no earlier or later one: forgetting, backward and forward transfer are 0.0 then.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def _matrix(values: ArrayLike, name: str) -> Matrix:
    """``values`` as a finite, non-empty 2-D float64 array, else ValueError."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: must be a rectangular matrix of numbers; fill in what is missing"
        ) from None
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"{name}: shape {array.shape}, must be 2-D and not empty; one row per stage, base first"
        )
    missing = np.argwhere(~np.isfinite(array))
    if missing.size:
        row, column = missing[0].tolist()
        raise ValueError(
            f"{name}[{row}, {column}]={array[row, column]}: must be finite ({len(missing)} values are not); "
            "evaluate every stage on every set"
        )
    return array


def _accuracy(R: ArrayLike) -> Matrix:
    """R as a checked [T + 1, T] float64 array."""
    array = _matrix(R, "R")
    if array.shape[0] != array.shape[1] + 1:
        raise ValueError(
            f"R: shape {array.shape}, must be (T + 1, T); put the base in row 0, then one row per task"
        )
    return array


def _mean(values: Matrix) -> float:
    """Mean of the entries; 0.0 of none."""
    return float(values.mean()) if values.size else 0.0


def just_trained(R: ArrayLike) -> list[float]:
    """R[i, i]: each task's score right after it was trained, in percent."""
    return [float(score) for score in np.diagonal(_accuracy(R)[1:])]


def average_accuracy(R: ArrayLike) -> float:
    """Mean over tasks of R[T, i], in percent."""
    return _mean(_accuracy(R)[-1])


def backward_transfer(R: ArrayLike) -> float:
    """Mean over i < T of R[T, i] - R[i, i], in points: negative when later training harms earlier tasks."""
    array = _accuracy(R)
    return _mean(array[-1, :-1] - np.diagonal(array[1:])[:-1])


def forgetting(R: ArrayLike) -> float:
    """Mean over i < T of max_t R[t, i] - R[T, i], in points.

    The maximum runs over all rows, the base and the last one included: what the base knew can be forgotten,
    and forgetting is never negative.
    """
    array = _accuracy(R)[:, :-1]
    return _mean(array.max(axis=0) - array[-1])


def forward_transfer(R: ArrayLike) -> float:
    """Mean over i >= 2 of R[i - 1, i] - R[0, i], in points: the head start that earlier tasks gave."""
    array = _accuracy(R)
    return _mean(np.diagonal(array)[1:] - array[0, 1:])


def pilot_average_accuracy(R: ArrayLike) -> float:
    """Mean over stages t of the mean over tasks i <= t of R[t, i], in percent (as PILOT reports it)."""
    array = _accuracy(R)[1:]
    return float(np.mean([array[stage, : stage + 1].mean() for stage in range(len(array))]))


def general_delta(general: ArrayLike) -> float:
    """Mean over held-out sets of the last row minus row 0.

    Args:
        general: [T + 1, G], rows as those of R, one column per held-out set; positive is better.
    """
    array = _matrix(general, "general")
    return _mean(array[-1] - array[0])


def summarise(
    R: ArrayLike, general: ArrayLike | None = None
) -> dict[str, float | list[float] | list[list[float]]]:
    """All numbers of one method, ready for `results.json` (plain floats, not rounded).

    Args:
        R: [T + 1, T] percent, see [Note: the accuracy matrix].
        general: [T + 1, G] scores on held-out sets; None or no column leaves its two keys out.

    Raises:
        ValueError: wrong shape, or a value that is not finite.
    """
    array = _accuracy(R)
    summary: dict[str, float | list[float] | list[list[float]]] = {
        "R": array.tolist(),
        "just_trained": just_trained(array),
        "average_accuracy": average_accuracy(array),
        "forgetting": forgetting(array),
        "backward_transfer": backward_transfer(array),
        "forward_transfer": forward_transfer(array),
        "pilot_average_accuracy": pilot_average_accuracy(array),
    }
    if general is not None and np.size(general) > 0:
        held_out = _matrix(general, "general")
        if len(held_out) != len(array):
            raise ValueError(
                f"general: {len(held_out)} rows, must be {len(array)} as in R; evaluate it at every stage"
            )
        summary |= {"general": held_out.tolist(), "general_delta": general_delta(held_out)}
    return summary
