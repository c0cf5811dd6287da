"""Importance and specificity, by hand."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from trace_dist.bank.sketch import Sketch, sketch_update
from trace_dist.masks.units import UnitLayout
from trace_dist.parts import SCORES
from trace_dist.probe.importance import Evidence, unit_importance
from trace_dist.probe.specificity import cosine_matrix, specificity, tensor_specificity
from trace_dist.probe.warm_start import Trace

U = torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.0, 4.0]])
F = torch.tensor([[4.0, 9.0, 1.0], [0.0, 16.0, 1.0]])
W = torch.tensor([[2.0, 0.0, 5.0], [1.0, -3.0, 0.5]])
G = torch.tensor([[1.0, -3.0, 0.0], [0.0, 2.0, -0.5]])
TRACE = Trace({"w": Evidence(W, U, G, F)}, [])
RMS = sqrt((4 + 25 + 1 + 9 + 0.25) / 6)


@pytest.mark.parametrize(
    ("score", "unit", "expected"),
    [
        ("l2", 1, [1, 2, 0, 3, 0, 4]),
        ("fisher", 1, [2, 3, 1, 0, 4, 1]),
        ("l2_fisher", 1, [2, 6, 0, 0, 0, 4]),
        # Units of 2 in rows of 3: the last one of each row has a single element.
        ("l2", 2, [sqrt(5 / 2), 0, sqrt(9 / 2), 4]),
        ("fisher", 2, [sqrt(13 / 2), 1, sqrt(16 / 2), 1]),
        ("l2_fisher", 2, [sqrt((4 + 36) / 2), 0, 0, 4]),
        ("l2", 3, [sqrt(5 / 3), sqrt(25 / 3)]),
        ("l2_fisher", 6, [sqrt((4 + 36 + 16) / 6)]),
        ("first_order", 1, [4, 0, 5, 0, 12, 0.5]),
        ("first_order", 3, [sqrt((16 + 25) / 3), sqrt((144 + 0.25) / 3)]),
        # A weight of zero counts as a thousandth of the root mean square.
        ("relative_update", 1, [1 / 2, 2 / (1e-3 * RMS), 0, 3, 0, 8]),
        # The second gradient has no noise beyond fp32's, the fourth is not there at all.
        ("snr", 1, [1 / sqrt(3), 1 / sqrt(2**-23), 0, 0, 2 / sqrt(12), 0.5 / sqrt(0.75)]),
    ],
)
def test_formulas(score: str, unit: int, expected: list[float]) -> None:
    found = unit_importance(TRACE, {"w": UnitLayout((2, 3), unit)}, score)["w"]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected)


def test_columns() -> None:
    found = unit_importance(TRACE, {"w": UnitLayout((2, 3), 2, 3)}, "l2")["w"]
    assert found.tolist() == pytest.approx([sqrt(10 / 2), sqrt(4 / 2), sqrt(16 / 2)])


def test_small_products_do_not_underflow() -> None:
    """u = 1e-12 and F = 1e-30 give u^2 F = 1e-54, below fp32."""
    update, fisher = torch.tensor([1e-12, 2e-12]), torch.tensor([1e-30, 1e-30])
    trace = Trace({"w": Evidence(torch.ones(2), update, torch.zeros(2), fisher)}, [])
    found = unit_importance(trace, {"w": UnitLayout((2,), 1)}, "l2_fisher")["w"]
    assert found.tolist() == pytest.approx([1e-27, 2e-27])


@pytest.mark.parametrize("score", SCORES)
def test_nothing_in_nothing_out(score: str) -> None:
    """A parameter that neither moved nor felt a gradient, of weights that are zero too."""
    zeros = torch.zeros(2, 3)
    found = unit_importance(
        Trace({"w": Evidence(zeros, zeros, zeros, zeros)}, []), {"w": UnitLayout((2, 3), 1)}, score
    )
    assert found["w"].tolist() == [0.0] * 6


def update(*values: float) -> dict[str, torch.Tensor]:
    """Two tensors: all but the last value, and the last value."""
    return {"a": torch.tensor(values[:-1]), "b": torch.tensor(values[-1:])}


def sketched(updates: list[dict[str, torch.Tensor]]) -> list[Sketch]:
    """Sketches of small tensors are these tensors, in fp32."""
    return [sketch_update(each, seed=0) for each in updates]


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ([update(1, 2, 3)], [1]),
        ([update(1, 2, 3), update(2, 4, 6)], [0, 0]),
        ([update(1, 2, 3), update(-2, -4, -6)], [0, 0]),
        ([update(1, 0, 0), update(0, 1, 0), update(0, 0, 1)], [1, 1, 1]),
        ([update(1, 0, 0), update(1, 1, 0), update(0, 0, 1)], [1 - sqrt(0.5), 1 - sqrt(0.5), 1]),
        ([update(0, 0, 0), update(1, 1, 0)], [1, 1]),
    ],
    ids=["one task", "parallel", "opposite", "orthogonal", "at 45 degrees", "no update"],
)
def test_specificity(updates: list[dict[str, torch.Tensor]], expected: list[float]) -> None:
    found = specificity(cosine_matrix(sketched(updates)))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert bool((found >= 0).all())
    assert bool((found <= 1).all())


def test_specificity_per_tensor() -> None:
    """Parallel in a, and in b only one of them moves."""
    one, other = sketched([update(1, 2, 0), update(3, 6, 1)])
    for found in (tensor_specificity(one, [other]), tensor_specificity(other, [one])):
        assert found == pytest.approx({"a": 0, "b": 1}, abs=1e-6)
    assert tensor_specificity(one, []) == {"a": 1, "b": 1}


def test_cosines_of_updates_too_small_for_fp32_squares() -> None:
    tiny = [update(1e-25, 0, 0), update(1e-25, 1e-25, 0)]
    assert float(cosine_matrix(sketched(tiny))[0, 1]) == pytest.approx(sqrt(0.5))
