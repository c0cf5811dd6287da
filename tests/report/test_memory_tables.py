"""Tables of predicted and measured memory."""

from __future__ import annotations

from typing import Any

from trace_dist.report.memory_tables import comparison_table, mib


def test_states_in_host_memory_stand_beside_those_that_were_measured() -> None:
    """With offloaded states on a GPU, measured is what both memories hold."""
    states, host = {"weights": 2 << 20, "master": 0}, {"weights": 0, "master": 3 << 20}
    result: dict[str, Any] = {
        "setup": {"world_size": 1, "density": 0.1, "backend": "single"},
        "estimate": {"num_parameters": 1, "states": states, "host": host, "between": {}, "peak": 4 << 20},
        "measured": {
            "states": {"weights": 2 << 20, "master": 3 << 20},
            "rank_states": [5 << 20],
            "between": {},
            "peak": 4 << 20,
        },
        "errors": {"states": 0.0, "peak": 0.0},
    }
    what, estimated, measured, _ = (list(column.cells) for column in comparison_table(result).columns)
    assert what == ["weights", "master", "states", "peak"]
    assert estimated == measured == [mib(size << 20) for size in (2, 3, 5, 4)]
