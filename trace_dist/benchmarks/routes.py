"""What it costs to find the task of a prompt, by the number of tasks: by the base, and by the tasks' own weights.

    python -m trace_dist.benchmarks.routes --out docs/results/routes.json

On random weights of a shape, in one process and thread, one prompt at a time, through the router that also answers
(serving/router.py). Times are those of the processor, so a machine that does other things beside changes them little; banks
take turns, and the median counts. Deltas are in host memory, as they are once a task has been asked for.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.signature import Signature
from trace_dist.benchmarks.contestants import Race
from trace_dist.benchmarks.swaps import random_delta
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.tokenizer import char_tokenizer
from trace_dist.serving.options import Source
from trace_dist.serving.router import Router
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.build import shard
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import write_json

SIZES = (1, 50)
KINDS = ("base", "adapted")
GRANULARITY = "row"


def measure(race: Race, sizes: Sequence[int] = SIZES, rounds: int = 3) -> dict[str, Any]:
    """Milliseconds of processor time until a prompt has its task.

    Args:
        race: shape, density of the deltas, tokens of the prompt.
        sizes: numbers of tasks.
        rounds: of each measurement; the first one, which reads deltas and signatures, comes on top.
    """
    model = shard(race.model())
    prompt, base = list(range(5, 5 + race.sequence)), fingerprint(model.module)
    with tempfile.TemporaryDirectory() as folder:
        routers = {
            (kind, size): _router(model, bank, kind)
            for size, bank in (
                (size, _bank(model, race, base, Path(folder) / str(size), size)) for size in sizes
            )
            for kind in KINDS
        }
        times: dict[tuple[str, int], list[float]] = {key: [] for key in routers}
        for _ in range(rounds + 1):
            for key, router in routers.items():
                begin = time.process_time()
                router.routes([prompt], [None])
                times[key].append(time.process_time() - begin)
    found = {key: 1e3 * statistics.median(each[1:]) for key, each in times.items()}
    return {
        "run_info": run_info(),
        "meta_info": meta_info(),
        "settings": {**asdict(race), "rounds": rounds, "candidates": Source.candidates},
        "rows": [
            {"tasks": size}
            | {f"{kind}_ms": found[kind, size] for kind in KINDS}
            | {f"{kind}_ratio": found[kind, size] / found[kind, sizes[0]] for kind in KINDS}
            for size in sizes
        ],
    }


def _bank(model: ShardedModel, race: Race, base: str, folder: Path, size: int) -> DeltaBank:
    """Random tasks, each with a signature under its own weights."""
    bank = DeltaBank.create(folder, base, layer=-1)
    for number in range(size):
        signature = _signature(number, model.config.hidden_size)
        bank.add(signature, random_delta(model, GRANULARITY, race.density, number), adapted=signature)
    return bank


def _signature(number: int, dim: int) -> Signature:
    """Random clusters; time does not depend on what they hold."""
    generator = torch.Generator().manual_seed(number)
    means, factor, heldout = (torch.randn(rows, dim, generator=generator) for rows in (4, 16, 4))
    return Signature(f"task{number}", means, torch.full((4,), 75), factor, heldout)


def _router(model: ShardedModel, bank: DeltaBank, kind: str) -> Router:
    source = Source(str(bank.folder), "", representation=kind)  # type: ignore[arg-type]
    return Router(DeltaBank(bank.folder), model, char_tokenizer({"any": ["any"]}, []), source)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time to find the task of a prompt; writes JSON.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="SmolLM2-135M")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--sequence", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    race = Race(given.shape, given.density, 1, given.sequence)
    write_json(given.out, measure(race))


if __name__ == "__main__":
    main()
