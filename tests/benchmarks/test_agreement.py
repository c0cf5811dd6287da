"""What is simulated beside what runs on CPU ranks: a small race from end to end, and the clock of single operators."""

from __future__ import annotations

import io
import pickle
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from launching import python, rank_environment

from trace_dist.benchmarks import agreement, cpu_clock
from trace_dist.benchmarks.contestants import Race
from trace_dist.benchmarks.scale_page import agreement_table
from trace_dist.profiling.simulation import calls
from trace_dist.profiling.simulation.calls import Call, Shape, pickled
from trace_dist.profiling.simulation.events import Event, Program
from trace_dist.profiling.simulation.gpus import load_gpu
from trace_dist.profiling.simulation.replay import Cluster, replay

RACE = Race("tiny", micro_batch=1, sequence=16)


@pytest.mark.launcher
def test_two_ranks_beside_their_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "RANKS", (2,))
    monkeypatch.setattr(agreement, "METHODS", ("row",))
    monkeypatch.setattr(agreement, "TINY", ("row", "LoRA"))
    monkeypatch.setattr(sys, "executable", python())  # which starts its ranks
    for name, value in rank_environment().items():
        monkeypatch.setenv(name, value)
    result = agreement.compare(RACE, steps=1, rounds=1)
    (row,) = result["rows"]
    simulated, measured = row["simulated"], row["measured"]
    assert simulated["sent_bytes"] == measured["sent_bytes"] > 0
    assert simulated["peak_bytes"] > 0 < measured["peak_bytes"]
    assert simulated["step_s"] > 0 < measured["step_s"]
    assert row["timed"] > 0.8  # of the operators
    assert "row, 2 ranks" in agreement_table(result)


def test_operators_are_called_as_they_were() -> None:
    weight = torch.empty(3, 5, device="meta", dtype=torch.bfloat16)
    call = Call.of(torch.ops.aten.mm.default, (weight, weight.T), {})
    assert call.operands[0][1] == Shape((5, 3), (1, 5), torch.bfloat16)
    args, kwargs = call.filled()
    product = call.function(*args, **kwargs)
    assert product.shape == (3, 3)
    assert product.device.type == "cpu"
    assert not product.isnan().any()
    assert call.key == Call.of(torch.ops.aten.mm.default, (weight.clone(), weight.T), {}).key
    found = cpu_clock.all_seconds({"it": call, "not": replace(call, name="aten.mm.out")})
    assert found.keys() == {"it"}
    assert found["it"] > 0


class OfCalls(pickle.Unpickler):
    """Reads what names ``calls`` alone."""

    def find_class(self, module: str, name: str) -> Any:
        assert module == calls.__name__, f"{module}.{name}"
        return super().find_class(module, name)


def test_types_are_handed_on_by_their_names_in_torch() -> None:
    """Pickle may find them in a module that the other process lacks."""
    asked = (torch.bfloat16, torch.strided, torch.preserve_format, Shape((2,), (1,), torch.bfloat16))
    assert OfCalls(io.BytesIO(pickled(asked))).load() == asked
    with pytest.raises((AssertionError, TypeError)):
        OfCalls(io.BytesIO(pickle.dumps(asked))).load()


def test_what_was_measured_by_itself_takes_as_long_in_a_step() -> None:
    events = [
        Event("kernel", "compute", "matmul", flops=10**12, number=0, operator="a"),
        Event("kernel", "compute", "other", number=1, operator="a"),
        Event("collective", "compute", "send", 0, 1e9, number=2, lane="gather", operator="b"),
    ]
    program = Program(events, 2, 0, 0, {}, 1, 1)
    gpu = replace(load_gpu("h100"), synchronous=True, host_us=0.0, measured={"a": 3.0, "b": 0.5})
    assert replay(program, Cluster(gpu, 1, 2, 1.0, overlaps=False)).step == pytest.approx(6.5)


def test_python_is_what_single_operators_leave() -> None:
    """Two tiny steps with other numbers of operators and hooks give both."""

    def step(kernels: int, hooks: int) -> Program:
        kinds = ["kernel"] * kernels + ["hook"] * hooks
        events = [Event(kind, "compute", "other", number=i, operator="a") for i, kind in enumerate(kinds)]
        return Program(events, 1, 0, 0, {}, 1, 1)

    constants = agreement.Constants({"rates": {"1024": 1e9}, "seconds": {"a": 1e-3}})
    pairs = [(step(10, 2), 10 * 1.1e-3 + 2 * 5e-3), (step(10, 8), 10 * 1.1e-3 + 8 * 5e-3)]
    constants.take_python(pairs)
    assert constants.python == pytest.approx({"host_us": 100, "hook_us": 5000})
    assert constants.step("row", step(20, 1)) == pytest.approx(20 * 1.1e-3 + 5e-3)
