"""``trace-dist simulate``: what a training would need on a cluster that need not be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_dist.profiling.simulation.setup import SimulationSetup
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import check_writable, write_json


def simulate_command(values: Any) -> None:
    """Simulate with the parsed arguments; print tables, or write JSON as well.

    Raises:
        ValueError: a value makes no sense, or the model has no readable config.
    """
    from trace_dist.benchmarks.simulate import simulate
    from trace_dist.report.memory_tables import print_table
    from trace_dist.report.simulation_tables import note, overview_table, spent_table, state_table

    check_writable(values.out, "out")
    setup = SimulationSetup(**{name: values[name] for name in SimulationSetup.__dataclass_fields__})
    found = simulate(setup)
    for table in (overview_table(found), spent_table(found), state_table(found)):
        print_table(table)
    print(note(found))
    if values.out is not None:
        write_json(Path(values.out), {"run_info": run_info(), "meta_info": meta_info(), **found})
