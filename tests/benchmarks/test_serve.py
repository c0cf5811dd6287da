"""What it costs to answer from a bank: that all of it is measured, on a model of two layers."""

from __future__ import annotations

import pytest

from trace_dist.benchmarks import serve
from trace_dist.benchmarks.contestants import Race


def test_everything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NUM_TASKS", 2), ("BATCH", 2), ("BANKS", (1, 3))):
        monkeypatch.setattr(serve, name, value)
    result = serve.bench_serving(Race("tiny", sequence=8), tokens=2, rounds=1)
    assert {"date", "commit"} <= result["run_info"].keys()
    assert result["meta_info"]["hardware"]
    swaps = {row["name"]: row for row in result["swaps"]}
    assert list(swaps) == ["delta", "delta, from disk", "merged checkpoint", "LoRA adapter"]
    assert swaps["delta"]["ratio"] == 1
    streams = {row["name"]: row for row in result["streams"]}
    assert len(streams) == 5
    assert streams["merged model, one task"]["ratio"] == 1
    assert [row["tasks"] for row in result["retrieval"]] == [1, 3]
    rows = [*swaps.values(), *streams.values(), *result["retrieval"]]
    assert all(value > 0 for row in rows for key, value in row.items() if key != "name")
