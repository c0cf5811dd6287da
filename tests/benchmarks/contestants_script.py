"""Every contestant of the race of training steps on the ranks of one job: ``contestants_script.py OUT``."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

from torch import nn

from trace_dist.benchmarks.contestants import CONTESTANTS, FOR_GPUS, LIGER, Race, build
from trace_dist.profiling.states import tensor_bytes
from trace_dist.profiling.wire import WireCounter
from trace_dist.utils import dist
from trace_dist.utils.files import write_json

RACE = Race("tiny", micro_batch=2, sequence=24)
SHARED = replace(RACE, attention="sdpa", sequence_parallel=2)
"""Both ranks read the same examples, each half of every row."""
OF_SHARED = ("row", "full", "LoRA, tuned")
COMPILED = [name for name in FOR_GPUS if not name.endswith(LIGER)]
STEPS = 3


def main() -> None:
    dist.ensure_group()
    # Blocks are traced as for torch's compiler, which would take a minute.
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")  # type: ignore[assignment,method-assign]
    found = {}
    runs = [(name, name, RACE) for name in (*CONTESTANTS, *COMPILED)] + [
        (f"{name}, shared", name, SHARED) for name in OF_SHARED
    ]
    for key, name, race in runs:
        contestant, losses = build(name, race), []
        for _ in range(STEPS):
            loss = contestant.forward()
            losses.append(float(loss))
            contestant.backward(loss)
            contestant.step()
        with WireCounter() as wire:
            contestant.backward(contestant.forward())
            contestant.step()
        found[key] = {
            "losses": losses,
            "num_trained": contestant.num_trained,
            "sent": {"weights": wire.gathered, "gradients": wire.reduced},
            "states": {kind: tensor_bytes(tensors) for kind, tensors in contestant.states().items()},
        }
    if dist.is_main():
        write_json(Path(sys.argv[1]), found)
    dist.barrier()
    # DeepSpeed's destructors take seconds and print.
    os._exit(0)


if __name__ == "__main__":
    main()
