"""Tables of predicted and measured memory."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import Any

import pytest

from trace_dist.cli.arguments import MEMORY_ACTIONS
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.plan import Option, plan
from trace_dist.profiling.simulation.setup import SimulationSetup
from trace_dist.report.memory_tables import NOT_AT_HIGH, comparison_table, mib, plan_table, print_table
from trace_dist.report.simulation_tables import overview_table, times_table


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


def test_a_plan_marks_what_may_not_fit_and_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    setup = MemorySetup("m", state_dtype="bfloat16", offload="cpu", activation_checkpointing=True)
    sizes = (12.5, 123.4, 0.52, 123.45, 12.34)
    options = [Option(setup, 102.3, 101.3, high, *sizes) for high in (103.0, 104.5)]
    print_table(plan_table(options[:1], 8, 103))
    assert NOT_AT_HIGH not in capsys.readouterr().out
    table = plan_table(options, 8, 103)
    print_table(table)
    printed = capsys.readouterr().out
    assert "\u2026" not in printed
    assert NOT_AT_HIGH in printed
    spans = next(column.cells for column in table.columns if column.header == "low to\nhigh")
    assert list(spans) == ["101.3 - 103.0", "101.3 - 104.5*"]


def test_predicted_times_mark_what_may_not_fit() -> None:
    row = {
        "name": "row",
        "density": 0.1,
        "micro_batch_size": 1,
        "activation_checkpointing": False,
        "peak_bytes": 2**30,
        "step_s": dict.fromkeys(("low", "expected", "high"), 1.0),
        "tokens_per_s": {"expected": 1.0},
    }
    told = ((True, True), (True, False), (False, False))
    table = times_table([{**row, "fits": fits, "fits_at_high": high} for fits, high in told], "h100")
    assert list(table.columns[5].cells) == ["yes", "yes*", "no"]
    assert table.caption == NOT_AT_HIGH


@pytest.mark.parametrize(("gib", "told"), [(23.0, "yes"), (23.5, "no"), (24.5, "no")])
def test_a_simulation_tells_what_fits_as_a_plan_does(gib: float, told: str) -> None:
    """With the reserve that `memory plan` leaves free."""
    step = dict.fromkeys(("low", "expected", "high"), 1.0)
    method = {
        "peak_bytes": gib * 2**30,
        "step_s": step,
        "tokens_per_s": step,
        "sent_bytes": {},
        "launches": {},
    }
    setup = asdict(SimulationSetup("model"))
    found = {"setup": setup, "gpu": {"name": "a GPU", "memory_gib": 24.0}, "methods": {"row": method}}
    assert list(overview_table(found).columns[2].cells) == [told]
    assert inspect.signature(plan).parameters["reserve_gib"].default == setup["reserve_gib"]
    assert MEMORY_ACTIONS["plan"].own["reserve_gib"][1] == setup["reserve_gib"]
    found["setup"] = asdict(SimulationSetup("model", reserve_gib=0.0))
    assert list(overview_table(found).columns[2].cells) == ["no" if gib > 24 else "yes"]
