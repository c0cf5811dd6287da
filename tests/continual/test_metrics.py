"""Metrics of a sequence: by hand, as properties, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from trace_dist.continual import metrics

# base; after A; after B; after C. Columns A, B, C.
R = np.array([[10.0, 20.0, 5.0], [90.0, 30.0, 7.0], [60.0, 80.0, 1.0], [40.0, 90.0, 100.0]])
GENERAL = np.array([[100.0, 50.0], [90.0, 50.0], [80.0, 60.0], [70.0, 58.0]])


def matrices(max_tasks: int = 6) -> st.SearchStrategy[NDArray[np.float64]]:
    percent = st.floats(0, 100, allow_subnormal=False)
    return st.integers(1, max_tasks).flatmap(lambda t: arrays(np.float64, (t + 1, t), elements=percent))


def test_by_hand() -> None:
    assert metrics.just_trained(R) == [90.0, 80.0, 100.0]
    assert metrics.average_accuracy(R) == pytest.approx((40 + 90 + 100) / 3)
    assert metrics.backward_transfer(R) == pytest.approx(((40 - 90) + (90 - 80)) / 2)
    assert metrics.forgetting(R) == pytest.approx(((90 - 40) + (90 - 90)) / 2)
    assert metrics.forward_transfer(R) == pytest.approx(((30 - 20) + (1 - 5)) / 2)
    assert metrics.pilot_average_accuracy(R) == pytest.approx((90 + (60 + 80) / 2 + (40 + 90 + 100) / 3) / 3)
    assert metrics.general_delta(GENERAL) == pytest.approx(((70 - 100) + (58 - 50)) / 2)


def test_forgetting_counts_what_the_base_knew() -> None:
    assert metrics.forgetting([[80.0, 0.0], [70.0, 0.0], [30.0, 90.0]]) == 50.0


def test_full_fine_tuning_of_the_quickstart_recipe() -> None:
    matrix = [[0, 0, 0], [99, 0, 0], [0, 100, 0], [0, 0, 100]]
    assert metrics.forgetting(matrix) == pytest.approx(99.5)
    assert metrics.backward_transfer(matrix) == pytest.approx(-99.5)
    assert metrics.average_accuracy(matrix) == pytest.approx(100 / 3)


def test_one_task_has_nothing_to_forget_or_transfer() -> None:
    one = [[20.0], [70.0]]
    assert metrics.average_accuracy(one) == metrics.pilot_average_accuracy(one) == 70.0
    assert metrics.forgetting(one) == metrics.backward_transfer(one) == metrics.forward_transfer(one) == 0.0


def test_summary_is_json_and_complete() -> None:
    summary = metrics.summarise(R, GENERAL)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["R"] == R.tolist()
    assert summary["general"] == GENERAL.tolist()
    assert summary["just_trained"] == [90.0, 80.0, 100.0]
    assert summary["general_delta"] == -11.0
    for name in (
        "average_accuracy",
        "forgetting",
        "backward_transfer",
        "forward_transfer",
        "pilot_average_accuracy",
    ):
        assert summary[name] == getattr(metrics, name)(R)


@pytest.mark.parametrize("general", [None, [], np.empty((4, 0)), [[], [], [], []]])
def test_summary_without_general_sets(general: object) -> None:
    assert not {"general", "general_delta"} & metrics.summarise(R, general).keys()  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_missing_scores_are_refused_with_their_place(value: float | None) -> None:
    broken = R.tolist()
    broken[2][1] = value  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"R\[2, 1\]=.*must be finite \(1 values are not\)"):
        metrics.summarise(broken)
    with pytest.raises(ValueError, match=r"general\[3, 0\]=nan"):
        metrics.summarise(R, [[1.0], [1.0], [1.0], [math.nan]])


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (4,), (1, 0), (2, 2, 1)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    for function in (metrics.average_accuracy, metrics.forgetting, metrics.just_trained, metrics.summarise):
        with pytest.raises(ValueError, match=r"R: shape"):
            function(np.zeros(shape))


def test_ragged_and_misfitting_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rectangular"):
        metrics.average_accuracy([[1.0, 2.0], [1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="general: 3 rows, must be 4"):
        metrics.summarise(R, GENERAL[:3])
    with pytest.raises(ValueError, match="general: shape"):
        metrics.general_delta(np.empty((4, 0)))


@given(matrices())
def test_forgetting_bounds_backward_transfer(matrix: NDArray[np.float64]) -> None:
    forgotten = metrics.forgetting(matrix)
    assert forgotten >= 0
    assert forgotten >= -metrics.backward_transfer(matrix) - 1e-9
    if np.array_equal(matrix.max(axis=0)[:-1], np.diagonal(matrix[1:])[:-1]):  # best just after training
        assert forgotten == pytest.approx(-metrics.backward_transfer(matrix))


@given(matrices(), st.floats(-50, 50))
def test_a_shift_of_all_scores_moves_averages_only(matrix: NDArray[np.float64], shift: float) -> None:
    for name in ("average_accuracy", "pilot_average_accuracy"):
        function = getattr(metrics, name)
        assert function(matrix + shift) == pytest.approx(function(matrix) + shift, abs=1e-9)
    for name in ("forgetting", "backward_transfer", "forward_transfer"):
        function = getattr(metrics, name)
        assert function(matrix + shift) == pytest.approx(function(matrix), abs=1e-9)


@given(matrices())
def test_final_average_is_just_trained_plus_backward_transfer(matrix: NDArray[np.float64]) -> None:
    num_tasks = matrix.shape[1]
    gained = metrics.backward_transfer(matrix) * (num_tasks - 1) / num_tasks
    assert metrics.average_accuracy(matrix) == pytest.approx(np.mean(metrics.just_trained(matrix)) + gained)


@given(matrices())
def test_a_deltas_bank_that_loses_nothing(matrix: NDArray[np.float64]) -> None:
    """Retrieved mode: a task keeps its just-trained score for ever and gains nothing before."""
    num_tasks = matrix.shape[1]
    kept = np.where(np.tri(num_tasks + 1, num_tasks, -1, dtype=bool), np.diagonal(matrix[1:]), 0.0)
    assert (
        metrics.forgetting(kept) == metrics.backward_transfer(kept) == metrics.forward_transfer(kept) == 0.0
    )
    assert metrics.average_accuracy(kept) == pytest.approx(np.mean(metrics.just_trained(kept)))
