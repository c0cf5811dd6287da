"""Intervals of paired differences."""

from __future__ import annotations

import numpy as np
import pytest

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


def test_the_share_of_a_gain() -> None:
    reference, best, other = answers(1.0), answers(0.0), answers(0.25)
    found = share_of_gain([(reference, best, other)] * 2)
    assert found.value == pytest.approx(0.75)
    assert found.low == pytest.approx(0.75)
