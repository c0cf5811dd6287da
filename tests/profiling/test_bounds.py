"""What is taken for the error of a predicted peak, and for blocks that wait to be freed."""

from __future__ import annotations

from pathlib import Path

import pytest

from trace_dist.config import Backend
from trace_dist.profiling.bounds import ESTIMATE_ERROR, SIMULATION_ERROR, bounds, waiting_bytes
from trace_dist.utils.files import read_json

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_errors_are_the_largest_that_were_measured() -> None:
    """Rounded up to the next tenth of a percent."""
    rows = read_json(RESULTS / "bench_memory.json")["rows"]
    estimated = max(row["measured"]["peak"] / row["estimate"]["peak"] - 1 for row in rows)
    assert 0 <= ESTIMATE_ERROR - estimated < 0.001
    simulated = max(
        row["measured"]["peak_bytes"] / row["simulated"]["peak_bytes"] - 1
        for row in read_json(RESULTS / "bench_simulate.json")["rows"]
        if row["name"] in ("full", "LoRA")
    )
    assert 0 <= SIMULATION_ERROR - simulated < 0.001


@pytest.mark.parametrize(
    ("backend", "ranks", "blocks"), [("zero3", 2, 2), ("zero3", 1, 0), ("fsdp2", 2, 0), ("single", 1, 0)]
)
def test_blocks_wait_where_they_are_gathered_ahead_of_what_is_computed(
    backend: Backend, ranks: int, blocks: int
) -> None:
    assert waiting_bytes(100, backend, ranks) == blocks * 100


def test_bounds_lie_around_the_expected_peak() -> None:
    assert bounds(100, 10, 0.05, 30) == (100, 110, pytest.approx(145))
