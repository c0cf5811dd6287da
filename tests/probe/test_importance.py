"""Importance and specificity, by hand."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from trace_dist.bank.sketch import Sketch, sketch_update
from trace_dist.masks.units import UnitLayout
from trace_dist.parts import SCORES
from trace_dist.probe.importance import Evidence, Trace, element_energy, unit_importance
from trace_dist.probe.importance.contrast import Contrast
from trace_dist.probe.specificity import cosine_matrix, mean_cosines, specificity, tensor_specificity

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


def test_part_of_a_parameter_is_scored_as_in_the_whole() -> None:
    """A rank's first row, beside the root mean square that the parameter has on all ranks."""
    whole = element_energy(TRACE.evidence["w"], "relative_update")
    part = Evidence(*(each[0] for each in (W, U, G, F)), mean_square=RMS**2)
    torch.testing.assert_close(element_energy(part, "relative_update"), whole[0])


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


TWO = {
    "w": Evidence(W, U, G, F),
    "v": Evidence(*(torch.tensor([value]) for value in (1.0, -6.0, 0.5, 20.25))),
}


def test_the_sum_of_update_and_gradient_is_scaled_over_the_whole_model() -> None:
    """Updates of 0 to 6 and mean squared gradients of 0 to 20.25, over both tensors."""
    layouts = {"w": UnitLayout((2, 3), 1), "v": UnitLayout((1,), 1)}
    found = unit_importance(Trace(TWO, []), layouts, "l2_plus_fisher")
    expected = [
        (abs(u) / 6 + f / 20.25) / 2 for u, f in zip(U.flatten().tolist(), F.flatten().tolist(), strict=True)
    ]
    assert found["w"].tolist() == pytest.approx(expected)
    assert found["v"].tolist() == [1]
    assert found["w"].dtype == torch.float32


def test_whole_tensors_by_the_sum() -> None:
    """Of two tensors one is best and one is worst in each part: rms 6 over sqrt(5), mean square 20.25 over 31 / 6."""
    layouts = {"w": UnitLayout((2, 3), 6), "v": UnitLayout((1,), 1)}
    assert unit_importance(Trace(TWO, []), layouts, "l2_plus_fisher") == {
        "w": torch.zeros(1),
        "v": torch.ones(1),
    }


def test_what_every_task_needs_is_not_specific() -> None:
    """Three tasks, each over its mean; the third matters ten times as much everywhere, which must not count."""
    tasks = [{"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([1.0])}, {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([4.0])},
             {"a": torch.tensor([40.0, 10.0]), "b": torch.tensor([10.0])}]  # fmt: skip
    contrast = Contrast("specific")
    for task in tasks:
        contrast.add(task)
    # Means 2, 3 and 20; of the others 4/3 and 2 (mean 5/3), 1/3 and 1/2 (5/12), 4/3 and 1/2 (11/12).
    found = contrast.of(tasks[0])
    expected = [2 / (1 + 5 / 3), 0.5 / (1 + 5 / 12), 0.5 / (1 + 11 / 12)]
    assert torch.cat([found["a"], found["b"]]).tolist() == pytest.approx(expected)
    assert found["a"].dtype == torch.float32
    # Only the second task needs b much: there it is its most specific unit but for a's first.
    second = contrast.of(tasks[1])
    assert float(second["b"]) > float(second["a"][0])


def test_signed_cosines_are_averaged_one_task_after_the_other() -> None:
    own, same, opposite, apart = sketched(
        [update(1, 0, 2), update(3, 0, 2), update(-1, 0, 2), update(0, 5, -1)]
    )
    assert mean_cosines(own, iter([same, opposite, apart])) == pytest.approx({"a": 0, "b": 1 / 3}, abs=1e-6)
    assert mean_cosines(own, iter([opposite])) == pytest.approx({"a": -1, "b": 1})
    with pytest.raises(ValueError, match="no other task to compare with; add one"):
        mean_cosines(own, iter([]))


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
