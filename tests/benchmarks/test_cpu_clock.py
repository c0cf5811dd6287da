"""What the CPU's clock makes of an operator that cannot be called by itself."""

from __future__ import annotations

import logging
from typing import NoReturn

import pytest

from trace_dist.benchmarks import cpu_clock
from trace_dist.profiling.simulation.calls import Call


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("index out of range\nat aten"), "index out of range"),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_what_cannot_be_timed_is_left_out_with_its_cause(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Call) -> NoReturn:
        raise error

    monkeypatch.setattr(cpu_clock, "operator_seconds", fail)
    with caplog.at_level(logging.WARNING):
        assert cpu_clock.all_seconds({"one": Call("aten.embedding.default", ((), {}))}) == {}
    assert caplog.messages == [f"aten.embedding.default: not timed ({why})"]
