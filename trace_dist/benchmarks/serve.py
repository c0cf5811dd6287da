"""What it costs to answer from a bank: swaps beside their alternatives, mixed streams, and finding the task.

    trace-dist bench serve --out docs/results/bench_serve.json

On random weights of a shape, in one process. A swap puts a task's delta into the weights and takes it out again. Its alternatives
are to load the task's merged checkpoint, from files that the machine has in memory, and to switch PEFT's LoRA adapters of as many
parameters, which changes no weight and costs its two more products in every layer instead.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import Delta, applied
from trace_dist.bank.representation import represent
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature
from trace_dist.benchmarks.contestants import SHAPES, Race
from trace_dist.benchmarks.peers import with_adapters
from trace_dist.benchmarks.timing import now
from trace_dist.masks.ops import layouts_for, random_mask
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.loading import load_model
from trace_dist.models.tokenizer import char_tokenizer
from trace_dist.serving.options import Sampling, Source
from trace_dist.serving.router import Router
from trace_dist.sharding.build import shard
from trace_dist.utils import dist
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.log import get_logger
from trace_dist.utils.names import BASE

logger = get_logger(__name__)
NUM_TASKS = 8
BATCH = 8
"""Prompts of a batch; as many as tasks, so that a batch of every task's next prompt is torn into single ones."""
BANKS = (1, 10, 100, 1000)
"""Numbers of tasks among which one is found."""
GRANULARITY = "row"


def bench_serving(race: Race, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure swaps, streams and retrieval.

    Args:
        race: shape, density of the deltas, and tokens of a prompt.
        tokens: of each answer.
        rounds: of each measurement; the median counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        router = _router(race, Path(folder))
        swaps = _swaps(router, race, Path(folder), rounds)
        streams = _streams(router, race, Path(folder), tokens, rounds)
        retrieval = _retrieval(router, race, rounds)
    return {
        "run_info": run_info(),
        "meta_info": meta_info(),
        "settings": {**asdict(race), "tokens": tokens, "rounds": rounds, "tasks": NUM_TASKS, "batch": BATCH},
        "swaps": swaps,
        "streams": streams,
        "retrieval": retrieval,
    }


def _router(race: Race, folder: Path) -> Router:
    """A bank of random tasks, its base, and a checkpoint as large as each task's merged one."""
    model = shard(race.model())
    base, bank_folder = str(folder / "base"), str(folder / "bank")
    model.module.save_pretrained(base)
    tokenizer = char_tokenizer({"any": ["any"]}, [])
    tokenizer.save_pretrained(base)
    bank = DeltaBank.create(bank_folder, fingerprint(base), layer=-1)
    layouts = layouts_for(model, GRANULARITY, 1, "linear")
    for number in range(NUM_TASKS):
        mask = random_mask(layouts, GRANULARITY, race.density, number)
        generator = torch.Generator().manual_seed(number)
        values = {
            name: 0.02 * torch.randn(len(mask.elements(name)), generator=generator, dtype=torch.bfloat16)
            for name in mask
        }
        bank.add(_signature(number, model.config.hidden_size), Delta(mask, values, f"task{number}"))
    return Router(bank, model, tokenizer, Source(bank_folder, base, batch_size=BATCH))


def _signature(number: int, dim: int) -> Signature:
    """Random clusters; time does not depend on what they hold."""
    generator = torch.Generator().manual_seed(number)
    means, factor, heldout = (torch.randn(rows, dim, generator=generator) for rows in (4, 16, 4))
    return Signature(f"task{number}", means, torch.full((4,), 75), factor, heldout)


def _load(folder: Path) -> object:
    """A merged checkpoint: as large as the base."""
    return load_model(str(folder / "base"), torch.bfloat16).to(dist.local_device())  # type: ignore[arg-type]


def _nothing() -> None:
    """What is done before a batch where nothing has to be."""


def _median(work: Callable[[], object], rounds: int) -> float:
    """Seconds; the first time is a warm-up."""
    times = []
    for _ in range(rounds + 1):
        begin = now()
        work()
        times.append(now() - begin)
    return statistics.median(times[1:])


def _swaps(router: Router, race: Race, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds until another task can be answered, and back again."""
    bank, model = router.bank, router.model
    delta = bank.delta("task0")
    if delta is None:
        raise AssertionError("task0 has no delta")

    def swap() -> None:
        with applied(model, delta):
            pass

    def swap_from_disk() -> None:
        with bank.activated(model, "task0"):
            pass

    peer: Any = with_adapters("LoRA", race.model(), race.density)
    peer.add_adapter("other", peer.peft_config["default"])
    names = ["default", "other"]

    def switch() -> None:
        peer.set_adapter(names[0])
        names.reverse()

    rows: dict[str, Callable[[], object]] = {
        "delta": swap,
        "delta, from disk": swap_from_disk,
        "merged checkpoint": partial(_load, folder),
        "LoRA adapter": switch,
    }
    seconds = {name: _median(work, rounds) for name, work in rows.items()}
    for name, each in seconds.items():
        logger.info("%s: %.2f ms", name, 1e3 * each)
    return [
        {"name": name, "seconds": each, "ratio": each / seconds["delta"]} for name, each in seconds.items()
    ]


def _streams(router: Router, race: Race, folder: Path, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Answer tokens per second of ``NUM_TASKS * BATCH`` prompts, however they are mixed.

    Whatever is loaded in turn, the router's model writes: it is of the same size.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[race.shape]["vocab_size"]
    sampling = Sampling(max_new_tokens=tokens)
    prompts = torch.randint(5, vocabulary, (BATCH, race.sequence), generator=generator).tolist()

    def stream(batches: Sequence[tuple[str, int]], before: Callable[[], object]) -> float:
        """Tokens per second of some batches: task and number of prompts; what is done before each of them counts."""
        written = 0

        def write() -> None:
            nonlocal written
            written = 0
            for task, num in batches:
                before()
                rows = [router.row(prompt, sampling) for prompt in prompts[:num]]
                router.write(task, rows, sampling)
                written += sum(len(row.tokens) for row in rows)

        seconds = _median(write, rounds)
        return written / seconds

    tasks = [f"task{number}" for number in range(NUM_TASKS)]
    merged = [(BASE, BATCH)] * NUM_TASKS
    rows: dict[str, tuple[list[tuple[str, int]], Callable[[], object]]] = {
        "merged model, one task": (merged, _nothing),
        "one task": ([("task0", BATCH)] * NUM_TASKS, _nothing),
        "all tasks, full batches": ([(task, BATCH) for task in tasks], _nothing),
        "all tasks, single prompts": ([(task, 1) for task in tasks] * BATCH, _nothing),
        "merged models, loaded in turn": (merged, partial(_load, folder)),
    }
    rates = {name: stream(*row) for name, row in rows.items()}
    for name, rate in rates.items():
        logger.info("%s: %.0f tokens/s", name, rate)
    first = next(iter(rates.values()))
    return [{"name": name, "tokens_per_s": rate, "ratio": rate / first} for name, rate in rates.items()]


def _retrieval(router: Router, race: Race, rounds: int) -> list[dict[str, Any]]:
    """Time to find one prompt's task among many, beside the base's pass over it."""
    model, dim = router.model, router.model.config.hidden_size
    prompt = list(range(5, 5 + race.sequence))
    read = _median(lambda: represent(model.module, [prompt], layer=-1, batch_size=1, pad_id=0), rounds)
    x = torch.randn(1, dim, generator=torch.Generator().manual_seed(0))
    retriever, rows = Retriever(), list[dict[str, Any]]()
    for num_tasks in BANKS:
        for number in range(len(retriever.tasks), num_tasks):
            retriever.add(_signature(number, dim))
        # The first time in `_median` makes the covariance and the clusters' coordinates, once per bank.
        seconds = _median(lambda: retriever.scores(x), rounds)
        size = sum(each.num_bytes for each in retriever.signatures)
        rows.append(
            {
                "tasks": num_tasks,
                "seconds": seconds,
                "prefill_s": read,
                "share": seconds / read,
                "signature_bytes": size,
            }
        )
        logger.info("%d tasks: %.2f ms, %.2f of a pass", num_tasks, 1e3 * seconds, seconds / read)
    return rows
