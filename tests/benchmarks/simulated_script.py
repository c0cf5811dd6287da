"""Contestants of ``contestants_script`` on one simulated rank: ``simulated_script.py OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.contestants_script import OF_SHARED, RACE, SHARED
from transformers import LlamaConfig

from trace_dist.benchmarks.contestants import FSDP2, SHAPES, Race, build
from trace_dist.benchmarks.simulate import described, record, simulate
from trace_dist.masks.ops import layouts_for
from trace_dist.profiling.simulation.gpus import load_gpu
from trace_dist.profiling.simulation.replay import Cluster
from trace_dist.profiling.simulation.setup import METHODS, SimulationSetup
from trace_dist.utils.files import write_json

GATHERS = ("gather", "broadcast", "send")


def on(num_ranks: int, name: str, race: Race = RACE) -> dict[str, Any]:
    """One contestant on the CPUs of some ranks."""
    program = record(lambda: build(name, race), num_ranks, race.micro_batch * race.sequence, synchronous=True)
    found = described(program, Cluster(load_gpu("h100"), 1, num_ranks, 400))
    weights = sum(n for kind, n in found["sent_bytes"].items() if any(part in kind for part in GATHERS))
    sent = {"weights": weights, "gradients": sum(found["sent_bytes"].values()) - weights}
    return {**found, "sent": sent}


def main(out: Path) -> None:
    config = LlamaConfig(**{**SHAPES["tiny"], "num_hidden_layers": 4})
    config.save_pretrained(out.parent / "model")
    found: dict[str, Any] = {
        "two ranks": {
            **{name: on(2, name) for name in (*METHODS, f"row{FSDP2}", f"full{FSDP2}")},
            **{f"{name}, shared": on(2, name, SHARED) for name in OF_SHARED},
        },
        "64 ranks": {"element": on(64, "element")},
        "masked matrices": len(layouts_for(RACE.model(), "element", 1, "linear")),
    }
    for kind, blocks in (("whole", 4), ("repeated", 2)):
        setup = SimulationSetup(
            str(out.parent / "model"), 2, 4, methods=("row", "full"), sequence_length=24, blocks=blocks
        )
        found[kind] = simulate(setup)["methods"]
    write_json(out, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
