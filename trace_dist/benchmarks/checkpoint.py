"""What a checkpoint costs: how long training stands still for it, and what the steps beside its writing lose.

    trace-dist bench checkpoint --out docs/results/bench_checkpoint.json

Each contestant trains on ranks of its own (masked training under ZeRO-3, full fine-tuning in one process) and takes the same few
steps again and again: without a checkpoint, with one that training waits for, and with one that is written beside training. Its
stall is the time that the main thread spends on it, between the steps. What training loses by it is the time of these steps less
that of as many steps without a checkpoint: on a machine whose cores all compute, writing takes some of their time too.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trace_dist.benchmarks.contestants import Race, own_loss
from trace_dist.benchmarks.jobs import run_job, run_rank
from trace_dist.benchmarks.timing import now
from trace_dist.checkpoint import Background, write_checkpoint
from trace_dist.config import TrainConfig
from trace_dist.masks.ops import layouts_for, random_mask
from trace_dist.sharding.build import shard
from trace_dist.train.learner import DenseLearner, Learner, MaskedLearner
from trace_dist.utils import dist
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
MASKED, FULL = "row mask", "full fine-tuning"
MODES = ("none", "waits", "beside")
"""No checkpoint; one that training waits for; one that is written beside training."""
WARM_UP = 2


def bench_checkpoint(race: Race, num_ranks: int, rounds: int, steps: int) -> dict[str, Any]:
    """Time both contestants.

    Args:
        race: model and batch.
        num_ranks: of masked training, one thread each.
        rounds: how often each mode takes its turn; the median counts.
        steps: after each checkpoint.

    Returns:
        JSON-ready: a row per contestant with ``step_s``, the ``bytes`` of a checkpoint, and for ``waits`` and ``beside`` the
        ``stall_s``, its share of a step, and ``lost_s`` of that turn.
    """
    rows = []
    for name, ranks in ((MASKED, num_ranks), (FULL, 1)):
        logger.info("%s on %d ranks", name, ranks)
        rows.append({"name": name, "num_ranks": ranks, **_measured(race, name, ranks, rounds, steps)})
    settings = {**asdict(race), "rounds": rounds, "steps": steps}
    return {"run_info": run_info(), "meta_info": meta_info(), "settings": settings, "rows": rows}


def _measured(race: Race, name: str, num_ranks: int, rounds: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        asked = {"race": asdict(race), "name": name, "rounds": rounds, "steps": steps, "root": root}
        return run_job(__name__, asked, num_ranks)


def build(name: str, race: Race) -> tuple[Learner, Any]:
    """A contestant, and what gives its loss."""
    cfg = TrainConfig(lr=1e-4)
    if name == FULL:
        module = race.model().float()
        return DenseLearner(module, module.parameters(), cfg, dtype="bfloat16"), own_loss(module, race)
    model = shard(race.model(), "zero3")
    mask = random_mask(layouts_for(model, "row", 0, "linear"), "row", race.density, 0)
    return MaskedLearner(model, mask, cfg), own_loss(model, race)


class Turns:
    """One contestant on this rank, its checkpoints in ``root``."""

    def __init__(self, learner: Learner, loss: Any, root: Path) -> None:
        self._learner, self._loss, self._root = learner, loss, root
        self._background = Background()
        self._done = 0

    def take(self, mode: str, steps: int) -> dict[str, float]:
        """A checkpoint of this mode, then some steps: their time, and the stall, s."""
        dist.barrier()
        begin = now()
        if mode == "waits":
            self._learner.save(self._root, self._done, {}, write=write_checkpoint)
        elif mode == "beside":
            self._learner.save(self._root, self._done, {}, write=self._background.save)
        stall = now() - begin
        for _ in range(steps):
            attended = now()
            self._background.attend()
            stall += now() - attended
            self._step()
        whole = now() - begin
        # What is left to write is nobody's step.
        self._background.finish()
        return {"seconds": whole, "stall_s": stall}

    def close(self) -> None:
        """End the thread."""
        self._background.close()

    def _step(self) -> None:
        self._learner.backward(self._loss())
        self._learner.step()
        self._done += 1


def measure(name: str, race: Race, rounds: int, steps: int, root: Path) -> dict[str, Any]:
    """All turns of a contestant on this job's ranks."""
    turns = Turns(*build(name, race), root)
    turns.take("none", WARM_UP)
    # The first one takes the host memory that the others use again.
    first = turns.take("beside", WARM_UP)["stall_s"]
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode in MODES:
            found[mode].append(turns.take(mode, steps))
    turns.close()
    plain = statistics.median(turn["seconds"] for turn in found["none"])
    row: dict[str, Any] = {
        "step_s": plain / steps,
        "bytes": sum(path.stat().st_size for path in max(root.iterdir()).iterdir()),
        "first_stall_s": first,
    }
    for mode in MODES[1:]:
        stall = statistics.median(turn["stall_s"] for turn in found[mode])
        lost = statistics.median(turn["seconds"] for turn in found[mode]) - plain
        row[mode] = {
            "stall_s": stall,
            "stall_steps": stall * steps / plain,
            "lost_s": lost,
            "turns": found[mode],
        }
    return row


if __name__ == "__main__":
    run_rank(
        lambda asked: measure(
            asked["name"], Race(**asked["race"]), asked["rounds"], asked["steps"], Path(asked["root"])
        )
    )
