"""Intervals of paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from trace_dist.studies.images import interval
from trace_dist.studies.statistics import Answers, difference, share_of_gain

TOKENS = np.full(100, 4.0)


def answers(mean: float, seeds: int = 1, spread: float = 0.0, seed: int = 0) -> Answers:
    """Examples of very different difficulty, which both arms of a pair share."""
    hard = np.random.default_rng(0).exponential(4.0, 100)
    shift = np.random.default_rng(seed + 1).normal(0, spread, (seeds, 1))
    return Answers(hard + 4 * (mean + shift), TOKENS)


def test_a_small_difference_is_seen_since_examples_are_paired() -> None:
    found = difference([(answers(0.1), answers(0.2))])
    assert found.value == pytest.approx(-0.1)
    assert found.verdict == "lower"
    assert found.high - found.low < 1e-6
    assert difference([(answers(0.2), answers(0.1))]).verdict == "higher"


def test_seeds_that_differ_widen_the_interval() -> None:
    narrow = difference([(answers(0.0, 4), answers(0.0, 4))])
    wide = difference([(answers(0.0, 4, 0.5, 1), answers(0.0, 4, 0.5, 2))])
    assert narrow.high - narrow.low < 1e-6
    assert wide.high - wide.low > 0.3
    # Over tasks, the mean is surer.
    many = difference([(answers(0.0, 4, 0.5, n), answers(0.0, 4, 0.5, n + 100)) for n in range(12)])
    assert many.high - many.low < wide.high - wide.low


def of_seeds(values: list[float]) -> Answers:
    """An arm whose examples are alike, so that its seeds alone differ."""
    return Answers(np.repeat(np.array(values)[:, None], 5, axis=1), np.ones(5))


@pytest.mark.parametrize("values", [[0.1, 0.4], [0.3, -0.2, 0.5], [0.2, 0.1, -0.4, 0.3, 0.6]])
def test_few_seeds_have_the_interval_of_student(values: list[float]) -> None:
    """Resampled ones would have that of their extremes: too narrow by a factor of 13 where there are two."""
    found = difference([(of_seeds(values), of_seeds([0.0] * len(values)))], paired=True)
    assert [found.value, found.low, found.high] == pytest.approx(interval(values), rel=0.15)


@pytest.mark.parametrize(("seeds", "tasks"), [(2, 1), (3, 1), (2, 4)])
def test_an_interval_holds_what_is_true_as_often_as_it_says(seeds: int, tasks: int) -> None:
    generator, held = np.random.default_rng(0), []
    for _ in range(300):
        values = generator.normal(0, 1, (tasks, 2, seeds)).tolist()
        found = difference([(of_seeds(first), of_seeds(second)) for first, second in values])
        held.append(found.verdict == "undecided")
    assert 0.92 <= np.mean(held) <= 0.99


def test_what_a_run_does_to_all_tasks_alike_does_not_average_out() -> None:
    values = [0.3, -0.2, 0.5]
    pair = of_seeds(values), of_seeds([0.0] * 3)
    one, many = difference([pair], paired=True), difference([pair] * 9, paired=True)
    assert (many.high - many.low) == pytest.approx(one.high - one.low, rel=0.15)
    with pytest.raises(AssertionError, match="paired"):
        difference([(of_seeds(values), of_seeds([0.0] * 2))], paired=True)


def test_the_share_of_a_gain() -> None:
    reference, best, other = answers(1.0), answers(0.0), answers(0.25)
    found = share_of_gain([(reference, best, other)] * 2)
    assert found.value == pytest.approx(0.75)
    assert found.low == pytest.approx(0.75)
