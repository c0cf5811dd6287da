"""Every contestant of the race of training steps on the ranks of one job: ``contestants_script.py OUT``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trace_dist.benchmarks.contestants import CONTESTANTS, Race, build
from trace_dist.profiling.states import tensor_bytes
from trace_dist.profiling.wire import WireCounter
from trace_dist.utils import dist
from trace_dist.utils.files import write_json

RACE = Race("tiny", micro_batch=2, sequence=24)
STEPS = 3


def main() -> None:
    dist.ensure_group()
    found = {}
    for name in CONTESTANTS:
        contestant, losses = build(name, RACE), []
        for _ in range(STEPS):
            loss = contestant.forward()
            losses.append(float(loss))
            contestant.backward(loss)
            contestant.step()
        with WireCounter() as wire:
            contestant.backward(contestant.forward())
            contestant.step()
        found[name] = {
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
