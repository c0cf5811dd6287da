"""The sequence of tasks on one sharded model, in the modes that trace_dist offers.

- ``retrieved`` (and ``random``, with random masks): every task is trained from the base on its own mask, kept as a delta, and
  the base is put back; at test time each input retrieves its delta.
- ``merged``: one set of weights; every task continues from the last, a small share of each batch is replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.bound import error_bound
from trace_dist.bank.delta import Snapshot, check_base, extract_delta
from trace_dist.config import RunConfig
from trace_dist.continual.judge import Judge, Row
from trace_dist.continual.metrics import summarise
from trace_dist.masks.format import Mask
from trace_dist.probe.project import mask_path
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.loop import MetricLog, TrainResult
from trace_dist.train.task import train_mask
from trace_dist.train.workbench import Stream, Workbench
from trace_dist.utils import dist
from trace_dist.utils.env import run_info
from trace_dist.utils.files import write_json
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def mode_path(cfg: RunConfig, mode: str) -> Path:
    """Where a mode's result lies."""
    return Path(cfg.run_dir) / "modes" / f"{mode}.json"


def bank_folder(cfg: RunConfig, mode: str = "retrieved") -> Path:
    """The bank of a mode; the run's own is ``bank``."""
    return Path(cfg.run_dir) / ("bank" if mode == "retrieved" else f"bank_{mode}")


def load_masks(cfg: RunConfig, mode: str, fingerprint: str) -> list[Mask]:
    """The target's masks of all tasks.

    Raises:
        ValueError: a mask is missing, corrupt, or of another model.
    """
    masks = []
    for task in cfg.tasks:
        path = mask_path(cfg, task.name, "random" if mode == "random" else "projected")
        mask = Mask.load(path)
        check_base(mask, fingerprint, str(path))
        masks.append(mask)
    return masks


def finish_mode(
    cfg: RunConfig,
    mode: str,
    judge: Judge,
    rows: list[Row],
    trained: list[TrainResult],
    facts: dict[str, Any],
) -> None:
    """Write a mode's result from its rows of scores."""
    result: dict[str, Any] = {
        **summarise(
            [row.tasks for row in rows], [row.general for row in rows] if judge.general_names else None
        ),
        "general_names": judge.general_names,
        "bits_per_byte": {
            name: [row.bits_per_byte[i] for row in rows] for i, name in enumerate(judge.text_names)
        },
        "losses": {
            task.name: _thinned(result.losses) for task, result in zip(cfg.tasks, trained, strict=True)
        },
        "step_ms": sum(result.step_ms for result in trained) / len(trained),
        "seconds": sum(result.seconds for result in trained),
        "measured": run_info(),
        **facts,
    }
    if dist.is_main():
        write_json(mode_path(cfg, mode), result)
    logger.info("%s: %s", mode, " / ".join(f"{score:.1f}" for score in rows[-1].tasks))


def _thinned(curve: list[tuple[int, float]], points: int = 100) -> list[tuple[int, float]]:
    """At most about ``points`` points of a curve, the last one among them."""
    stride = -(-len(curve) // points)
    return curve[::-1][::stride][::-1]


class Sequence:
    """Runs modes on one model; the model holds the base weights before and after each.

    Args:
        model: the sharded target.
        cfg: the run.
        bench: its data.
        fingerprint: of the base model.
    """

    def __init__(self, model: ShardedModel, cfg: RunConfig, bench: Workbench, fingerprint: str) -> None:
        self.model, self.cfg, self.bench, self.fingerprint = model, cfg, bench, fingerprint
        self.judge = Judge(cfg, bench)
        self._base: Row | None = None

    def base_row(self) -> Row:
        """Scores of the base model."""
        if self._base is None:
            self._base = self.judge.score(self.model.module)
        return self._base

    def _train(self, mode: str, stream: Stream, mask: Mask, batches: Any) -> TrainResult:
        name = f"{mode}/{stream.task.name}"
        log = MetricLog(Path(self.cfg.run_dir), name)
        checkpoints = (
            Path(self.cfg.run_dir) / "checkpoints" / name if self.cfg.train.checkpoint_every else None
        )
        result, _ = train_mask(
            self.model,
            mask,
            batches,
            self.cfg.train,
            stream.steps,
            description=name,
            log=log,
            checkpoints=checkpoints,
        )
        log.close()
        self.model.detach()
        return result

    def run_isolated(self, mode: str) -> None:
        """Mode ``retrieved`` or ``random``: a delta per task, retrieved at test time. Collective."""
        cfg, bench = self.cfg, self.bench
        masks = load_masks(cfg, mode, self.fingerprint)
        rows = [self.base_row()]
        bank = DeltaBank.create(bank_folder(cfg, mode), self.fingerprint, cfg.bank.layer)
        if bench.general:
            bank.add(self.judge.signature(self.model, bench.general, BASE), None)
        judge = Judge(cfg, bench)  # its memory of scored examples belongs to this bank
        trained, sizes, entries = [], {}, 0
        for stream, mask in zip(bench.tasks, masks, strict=True):
            signature = self.judge.signature(self.model, [stream], stream.task.name)
            before = Snapshot(self.model, mask)
            trained.append(self._train(mode, stream, mask, bench.batches([stream], cfg.train.batch_size)))
            delta = extract_delta(self.model, mask, stream.task.name)
            before.restore()
            bank.add(signature, delta)
            sizes[stream.task.name], entries = delta.nbytes, entries + mask.num_entries
            rows.append(judge.score_retrieved(self.model, bank))
        facts = {
            "density": sum(mask.density for mask in masks) / len(masks),
            "trainable": entries // len(masks),
            "delta_bytes": sizes,
            "bytes_per_entry": sum(sizes.values()) / entries,
            "retrieval": self._retrieval(judge, bank),
        }
        finish_mode(cfg, mode, judge, rows, trained, facts)

    def _retrieval(self, judge: Judge, bank: DeltaBank) -> dict[str, Any]:
        """Where the tasks' test prompts go, and the bound on the error."""
        names = bank.tasks
        tasks = [stream.task for stream in self.bench.tasks]
        counts = {task.name: [0] * len(names) for task in tasks}
        for task in tasks:
            for name in judge.route(self.model, bank, task):
                counts[task.name][names.index(name)] += 1
        right = sum(counts[task.name][names.index(task.name)] for task in tasks)
        total = sum(map(sum, counts.values()))
        return {
            **error_bound(bank.retriever).to_json(),
            "accuracy": 100 * right / total,
            "tasks": [task.name for task in tasks],
            "columns": names,
            "confusion": list(counts.values()),
            "num_clusters": sum(len(signature.weights) for signature in bank.retriever.signatures),
        }

    def run_merged(self) -> None:
        """Mode ``merged``: masks on one set of weights, with replay. Collective."""
        cfg, bench = self.cfg, self.bench
        masks = load_masks(cfg, "merged", self.fingerprint)
        rows, trained, snapshots = [self.base_row()], [], []
        for index, (stream, mask) in enumerate(zip(bench.tasks, masks, strict=True)):
            replay = [*bench.general, *bench.tasks[:index]]
            snapshots.append(Snapshot(self.model, mask))
            batches = bench.batches([stream], cfg.train.batch_size, replay, cfg.continual.replay)
            trained.append(self._train("merged", stream, mask, batches))
            rows.append(self.judge.score(self.model.module))
        for snapshot in reversed(snapshots):
            snapshot.restore()
        facts = {
            "density": sum(mask.density for mask in masks) / len(masks),
            "trainable": sum(mask.num_entries for mask in masks) // len(masks),
            "replay": cfg.continual.replay,
            "replay_memory": cfg.continual.replay_memory,
        }
        finish_mode(cfg, "merged", self.judge, rows, trained, facts)

    def run(self, mode: str) -> None:
        """Run one masked mode. Collective."""
        modes: dict[str, Callable[[], None]] = {
            "retrieved": lambda: self.run_isolated("retrieved"),
            "random": lambda: self.run_isolated("random"),
            "merged": self.run_merged,
        }
        modes[mode]()
