"""``trace-dist bench simulate``: what is simulated against what runs, on the CPUs of one, two and three ranks.

    trace-dist bench simulate --out docs/results/bench_simulate.json

Bytes on the wire and memory are those that ``simulate`` counts. Its model of time gets this CPU's own constants, none of which is
taken from the steps that are predicted: every operator and collective that a step asks for is timed by itself
(``benchmarks.cpu_clock``), on as many ranks at once; what Python takes for an operator, and DeepSpeed at a module, comes from
steps of a tiny model.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from trace_dist.benchmarks.contestants import MASKED, NARROW, Race, build
from trace_dist.benchmarks.jobs import run_job, run_rank
from trace_dist.benchmarks.simulate import record
from trace_dist.benchmarks.timing import median_of, now
from trace_dist.profiling.measure import Watch, bytes_now, keep_freed_blocks, settle_allocator
from trace_dist.profiling.simulation.calls import pickled
from trace_dist.profiling.simulation.events import HOSTS, Program
from trace_dist.profiling.simulation.gpus import load_gpu
from trace_dist.profiling.simulation.replay import Cluster, replay
from trace_dist.profiling.simulation.setup import METHODS
from trace_dist.profiling.wire import WireCounter
from trace_dist.utils import dist
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
RANKS = (1, 2, 3)
TINY = ("row", "full", "LoRA")
"""Contestants of the tiny model: few and many modules of DeepSpeed's, few and many operators."""
WARM_UP, TINY_STEPS = 2, 15
LIMITS = {"peak": 0.05, "time": 0.20}
"""Relative errors that were aimed at."""
Found = dict[str, Any]


def compare(race: Race, steps: int, rounds: int) -> Found:
    """Simulated beside measured, for every method on one, two and three ranks.

    Args:
        race: model and batch.
        steps: that are timed in each round.
        rounds: how often each is started; the medians count.

    Raises:
        ProcessFailed: a job failed; its own error is printed above.
        ValueError: ranks would compute on a GPU here.
    """
    device = dist.local_device()
    if device.type != "cpu":
        raise ValueError(
            f"bench simulate: compares with ranks on CPUs, and ranks would compute on {device} here; set CUDA_VISIBLE_DEVICES= "
            "and DS_ACCELERATOR=cpu"
        )
    rows = []
    for world in RANKS:
        tiny = replace(race, shape="tiny", micro_batch=1, sequence=16)
        races = {("tiny", name): tiny for name in TINY} | {(race.shape, name): race for name in METHODS}
        programs = {key: _recorded(each, key[1], world) for key, each in races.items()}
        constants = Constants(_timed(list(programs.values()), race, world))
        measured: dict[tuple[str, str], list[Found]] = {key: [] for key in races}
        for number in range(rounds):
            for key, each in races.items():
                logger.info("%d ranks, round %d of %d: %s, %s", world, number + 1, rounds, *key)
                count = TINY_STEPS if each is tiny else steps
                asked = {"race": asdict(each), "name": key[1], "steps": count}
                measured[key].append(run_job(__name__, asked, world))
        constants.take_python(
            [(programs["tiny", name], median_of(measured["tiny", name], "step_s")) for name in TINY]
        )
        for name in METHODS:
            rows.append(_row(name, world, programs[race.shape, name], measured[race.shape, name], constants))
    settings = {**asdict(race), "steps": steps, "rounds": rounds}
    return {"run_info": run_info(), "meta_info": meta_info(), "settings": settings, "rows": rows}


def _recorded(race: Race, name: str, world: int) -> Program:
    return record(lambda: build(name, race), world, race.micro_batch * race.sequence, synchronous=True)


class Constants:
    """This CPU, as ``replay`` takes it.

    Args:
        timed: seconds of each operator and collective, and rates of our kernels by their block.
    """

    def __init__(self, timed: Found) -> None:
        self._rates = timed["rates"]
        self._gpu = replace(
            load_gpu("h100"),
            name="CPU",
            synchronous=True,
            measured=timed["seconds"],
            memory_share=1.0,
            kernel_us=0.0,
            host_us=0.0,
            hook_us=0.0,
        )

    def take_python(self, tiny: Sequence[tuple[Program, float]]) -> None:
        """Learn what Python takes for an operator and at a hook, by least squares.

        Args:
            tiny: steps in which nothing else takes long, and their seconds.
        """
        counts, rest = [], []
        for program, seconds in tiny:
            kinds = [event.kind for event in program.events if event.lane != HOSTS]
            counts.append([kinds.count("kernel") + kinds.count("collective"), kinds.count("hook")])
            rest.append([seconds - self.step("row", program)])
        solved = torch.linalg.lstsq(
            torch.tensor(counts, dtype=torch.float64), torch.tensor(rest, dtype=torch.float64)
        )
        host, hook = (max(0.0, 1e6 * float(each)) for each in solved.solution[:, 0])
        self._gpu = replace(self._gpu, host_us=host, hook_us=hook)

    def step(self, name: str, program: Program) -> float:
        """Seconds of a step."""
        gpu = replace(self._gpu, memory_gbps=self._rates[_block(name)] / 1e9)
        return replay(program, Cluster(gpu, 1, program.world_size, 1.0, overlaps=False)).step

    def share_timed(self, program: Program) -> float:
        """Of a step's operators, the share of which each was timed by itself."""
        kernels = [event for event in program.events if event.kind == "kernel"]
        return sum(event.operator in self._gpu.measured for event in kernels) / max(1, len(kernels))

    @property
    def python(self) -> dict[str, float]:
        """Microseconds of Python."""
        return {"host_us": self._gpu.host_us, "hook_us": self._gpu.hook_us}


def _block(name: str) -> str:
    """Elements of the blocks of a mask; rows are blocks that are long."""
    return str(MASKED.get(name, 1) or 1024)


def _timed(programs: Sequence[Program], race: Race, world: int) -> Found:
    """Every operator and collective of some programs, on as many ranks."""
    calls = {
        event.operator: program.calls[event.operator]
        for program in programs
        for event in program.events
        if event.operator and event.lane != HOSTS
    }
    logger.info("%d ranks: %d operators and collectives are timed", world, len(calls))
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "calls.pickle"
        blocks = sorted({int(_block(name)) for name in METHODS})
        given.write_bytes(pickled({"calls": calls, "density": race.density, "blocks": blocks}))
        return run_job("trace_dist.benchmarks.cpu_clock", {"calls": str(given)}, world)


def _row(name: str, world: int, program: Program, runs: Sequence[Found], constants: Constants) -> Found:
    sent = sum(size for _, size in program.sent().values())
    step, peak = median_of(runs, "step_s"), statistics.median(run["peak_bytes"] for run in runs)
    predicted = constants.step(name, program)
    errors = {"peak": program.peak / peak - 1, "time": predicted / step - 1}
    said = ", ".join(f"{key} {error:+.1%}" for key, error in errors.items())
    logger.info("%s on %d ranks: %s", name, world, said)
    return {
        "name": name,
        "ranks": world,
        "simulated": {"sent_bytes": sent, "peak_bytes": program.peak, "step_s": predicted},
        "measured": {"sent_bytes": runs[0]["sent_bytes"], "peak_bytes": peak, "step_s": step},
        "errors": errors,
        "spread_s": [
            min(each for run in runs for each in run["step_s"]),
            max(each for run in runs for each in run["step_s"]),
        ],
        "constants": constants.python,
        "timed": constants.share_timed(program),
    }


def measure(name: str, race: Race, steps: int) -> Found:
    """Peak memory of this rank, over two steps, then the seconds of others, then the bytes that one more sends. Collective.

    Of a process's memory the part counts that tensors take: all of their bytes, written or not, and nothing of Python's objects.
    """
    settle_allocator()
    # It also writes memory that nothing was written to; only then is it the process's.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # What libraries load and keep, and as many modules.
    warm = build(name, replace(race, shape=race.shape.removesuffix(NARROW) + NARROW))
    warm.once()
    device = dist.local_device()
    baseline = bytes_now(device)
    contestant = build(name, race)
    contestant.once()
    with Watch(device, baseline, interval_ms=1000) as watch:
        for _ in range(WARM_UP):
            contestant.once()
    torch.use_deterministic_algorithms(False)
    keep_freed_blocks()
    seconds = []
    for number in range(WARM_UP + steps):
        dist.barrier()
        begin = now()
        contestant.once()
        if number >= WARM_UP:
            seconds.append(now() - begin)
    with WireCounter() as wire:
        contestant.once()
    peaks = dist.gather_objects(watch.timeline.peak)
    return {
        "peak_bytes": peaks[0],
        "rank_peaks": peaks,
        "step_s": seconds,
        "sent_bytes": sum(wire.sent.values()),
    }


if __name__ == "__main__":
    run_rank(lambda asked: measure(asked["name"], Race(**asked["race"]), asked["steps"]))
