"""What it costs to answer from a bank: that all of it is measured, on a model of two layers."""

from __future__ import annotations

import pytest
import torch

from trace_dist.benchmarks import serve, swaps
from trace_dist.benchmarks.contestants import Race
from trace_dist.masks import Mask, UnitLayout


def test_everything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NUM_TASKS", 2), ("BATCH", 2), ("BANKS", (1, 3))):
        monkeypatch.setattr(serve, name, value)
    monkeypatch.setattr(swaps, "COPIED", 1 << 16)
    monkeypatch.setattr(swaps, "TURNS", 1)
    result = serve.bench_serving(Race("tiny", sequence=8), tokens=2, rounds=1)
    assert {"date", "commit"} <= result["run_info"].keys()
    assert result["meta_info"]["hardware"]
    measured = {row["name"]: row for row in result["swaps"]}
    assert list(measured) == ["delta", "delta, from disk", "merged checkpoint", "LoRA adapter"]
    assert measured["delta"]["ratio"] == 1
    streams = {row["name"]: row for row in result["streams"]}
    assert len(streams) == 6
    assert streams["merged model, all at once"]["ratio"] == streams["merged model, one by one"]["ratio"] == 1
    assert [row["tasks"] for row in result["retrieval"]] == [1, 3]
    sizes = {(row["name"], row["density"]): row for row in result["sizes"]}
    assert list(sizes) == [("copy", None), *swaps.SIZES]
    rows = [*measured.values(), *streams.values(), *sizes.values(), *result["retrieval"]]
    positive = {key for row in rows for key in row} - {"name", "density", "grown_bytes"}
    assert all(row[key] > 0 for row in rows for key in positive & row.keys())


def test_bytes_that_a_swap_moves() -> None:
    """Both ways values are read and lines written, and read where they hold others: two entries of one line, one of another;
    and a row of two whole lines."""
    layouts = {"w": UnitLayout((4, 64), 1), "v": UnitLayout((4, 64), 64)}
    units = {"w": torch.tensor([0, 31, 32], dtype=torch.int32), "v": torch.tensor([2], dtype=torch.int32)}
    single = Mask({"w": units["w"]}, {"w": layouts["w"]}, "element")
    row = Mask({"v": units["v"]}, {"v": layouts["v"]}, "row")
    assert swaps.moved_bytes(single, 2) == 2 * (3 * 2 + 2 * 2 * 64)
    assert swaps.moved_bytes(row, 2) == 2 * (64 * 2 + 2 * 64)
