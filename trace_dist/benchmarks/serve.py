"""What it costs to answer from a bank: swaps beside their alternatives, mixed streams, and finding the task.

    trace-dist bench serve --out docs/results/bench_serve.json

On random weights of a shape, in one process. Swaps are measured in benchmarks/swaps.py. Streams go through the server's own
worker (serving/worker.py), which groups what waits by task: a stream that is there at once fills its batches, and one whose
prompts come one after another, each when the last is answered, has none. Each is put beside the same stream to one merged model.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.representation import represent
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature
from trace_dist.benchmarks.contestants import SHAPES, Race
from trace_dist.benchmarks.swaps import load_merged, measure_sizes, measure_swaps, medians, random_delta
from trace_dist.benchmarks.timing import now
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.tokenizer import char_tokenizer
from trace_dist.profiling.measure import bytes_now
from trace_dist.serving.options import Listening, Sampling, Source
from trace_dist.serving.router import Router
from trace_dist.serving.tally import Tally
from trace_dist.serving.worker import Job, Worker
from trace_dist.sharding.build import shard
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.log import get_logger
from trace_dist.utils.names import BASE

logger = get_logger(__name__)
NUM_TASKS = 8
BATCH = 4
"""Prompts of a batch, and of each task in a stream that is there at once."""
BANKS = (1, 10, 100, 1000)
"""Numbers of tasks among which one is found."""
GRANULARITY = "row"
CPU = torch.device("cpu")
AT_ONCE, ONE_BY_ONE = ", all at once", ", one by one"
"""Ends of streams' names: those of one kind are put beside each other."""


def bench_serving(race: Race, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure swaps, streams and retrieval.

    Args:
        race: shape, density of the deltas, and tokens of a prompt.
        tokens: of each answer.
        rounds: of each measurement; the median counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        router = _router(race, Path(folder))
        swaps = measure_swaps(router, race, Path(folder), rounds)
        loading = next(row["seconds"] for row in swaps if row["name"] == "merged checkpoint")
        sizes = measure_sizes(router.model, loading, rounds)
        retrieval = _retrieval(router, race, rounds)
        streams = _streams(router, race, Path(folder), tokens, rounds)
    return {
        "run_info": run_info(),
        "meta_info": meta_info(),
        "settings": {**asdict(race), "tokens": tokens, "rounds": rounds, "tasks": NUM_TASKS, "batch": BATCH},
        "swaps": swaps,
        "sizes": sizes,
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
    for number in range(NUM_TASKS):
        delta = random_delta(model, GRANULARITY, race.density, number)
        bank.add(_signature(number, model.config.hidden_size), delta)
    return Router(bank, model, tokenizer, Source(bank_folder, base, batch_size=BATCH))


def _signature(number: int, dim: int) -> Signature:
    """Random clusters; time does not depend on what they hold."""
    generator = torch.Generator().manual_seed(number)
    means, factor, heldout = (torch.randn(rows, dim, generator=generator) for rows in (4, 16, 4))
    return Signature(f"task{number}", means, torch.full((4,), 75), factor, heldout)


class _Stream:
    """Prompts that are put to a worker.

    Args:
        worker: answers them.
        prompts: token ids, taken in turn.
        sampling: of the answers.
        tasks: of each prompt.
        at_once: how many wait at the same time.
        before: is done before so many are put to it.
    """

    def __init__(
        self,
        worker: Worker,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        tasks: Sequence[str],
        at_once: int,
        before: Callable[[], object] | None = None,
    ) -> None:
        self._worker, self._prompts, self._sampling = worker, prompts, sampling
        self._tasks, self._at_once, self._before = tasks, at_once, before

    def tokens_per_s(self) -> float:
        """Answer tokens over the time of all."""
        begin, written = now(), 0
        for first in range(0, len(self._tasks), self._at_once):
            if self._before is not None:
                self._before()
            jobs = [
                Job(self._prompts[number % len(self._prompts)], task, self._sampling)
                for number, task in enumerate(self._tasks[first : first + self._at_once], first)
            ]
            self._worker.submit(jobs)
            written += sum(answer.num_tokens for job in jobs for answer in job.done.result())
        return written / (now() - begin)


def _streams(router: Router, race: Race, folder: Path, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Answer tokens per second of streams of prompts, in turns; the ratio is to one merged model's stream of the same kind.

    Whatever is loaded in turn, the router's model writes: it is of the same size.
    """
    generator = torch.Generator().manual_seed(0)
    size = (NUM_TASKS, race.sequence)
    prompts = torch.randint(5, SHAPES[race.shape]["vocab_size"], size, generator=generator).tolist()
    sampling = Sampling(max_new_tokens=tokens)
    tasks = [f"task{number}" for number in range(NUM_TASKS)]
    mixed = tasks * BATCH
    random.Random(0).shuffle(mixed)
    worker = Worker(router, Listening(max_waiting=len(mixed)), Tally())
    worker.start()

    def stream(tasks: list[str], at_once: int, before: Callable[[], object] | None = None) -> _Stream:
        return _Stream(worker, prompts, sampling, tasks, at_once, before)

    many, one = [BASE] * len(mixed), [BASE] * NUM_TASKS
    rows = {
        f"merged model{AT_ONCE}": stream(many, len(mixed)),
        f"one task{AT_ONCE}": stream(["task0"] * len(mixed), len(mixed)),
        f"all tasks, mixed{AT_ONCE}": stream(mixed, len(mixed)),
        f"merged models, loaded in turn{AT_ONCE}": stream(many, BATCH, lambda: load_merged(folder)),
        f"merged model{ONE_BY_ONE}": stream(one, 1),
        f"all tasks, mixed{ONE_BY_ONE}": stream(tasks, 1),
    }
    try:
        stream(tasks[:1], 1).tokens_per_s()  # a warm-up
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(rounds):
            for name, row in rows.items():
                rates[name].append(row.tokens_per_s())
                logger.info("%s: %.1f tokens/s", name, rates[name][-1])
    finally:
        worker.close()
    found = []
    for name, each in rates.items():
        kind = ONE_BY_ONE if name.endswith(ONE_BY_ONE) else AT_ONCE
        ratios = [mine / theirs for mine, theirs in zip(each, rates[f"merged model{kind}"], strict=True)]
        found.append(
            {"name": name, "tokens_per_s": statistics.median(each), "ratio": statistics.median(ratios)}
        )
    return found


def _retrieval(router: Router, race: Race, rounds: int) -> list[dict[str, Any]]:
    """Time to find one prompt's task among many, beside the base's pass over it, and what the tasks take in memory."""
    model, dim = router.model, router.model.config.hidden_size
    prompt = list(range(5, 5 + race.sequence))
    reading = {"read": lambda: represent(model.module, [prompt], layer=-1, batch_size=1, pad_id=0)}
    read = medians(reading, rounds)["read"]
    x = torch.randn(1, dim, generator=torch.Generator().manual_seed(0))
    before = bytes_now(CPU)
    retriever, rows = Retriever(), list[dict[str, Any]]()
    for num_tasks in BANKS:
        for number in range(len(retriever.tasks), num_tasks):
            retriever.add(_signature(number, dim))
        # The first time, the warm-up, makes the covariance and the clusters' coordinates, once per bank.
        seconds = medians({"find": lambda: retriever.scores(x)}, 5 * rounds)["find"]
        rows.append(
            {
                "tasks": num_tasks,
                "seconds": seconds,
                "prefill_s": read,
                "share": seconds / read,
                "signature_bytes": sum(each.num_bytes for each in retriever.signatures),
                "grown_bytes": bytes_now(CPU) - before,
            }
        )
        logger.info("%d tasks: %.2f ms, %.4f of a pass", num_tasks, 1e3 * seconds, seconds / read)
    return rows
