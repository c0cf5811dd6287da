"""Probing one task: a warm start of the proxy, and what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trace_dist.bank.sketch import Sketch, sketch_update
from trace_dist.config import ProbeConfig, TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.masks.units import UnitLayout
from trace_dist.models.fingerprint import same_model
from trace_dist.probe.importance import unit_importance
from trace_dist.probe.warm_start import warm_start
from trace_dist.utils.files import reading
from trace_dist.utils.sealed import load_sealed, save_sealed

KIND = "trace"
SKETCH_SEED = 0
"""Of all sketches: only those of one seed compare, and a bank outlives the seeds of its runs."""


@dataclass(frozen=True)
class Probed:
    """What is kept of a warm start.

    Attributes:
        scores: parameter -> importance of its units, [num_units] fp32.
        sketch: of the update, with which other tasks are compared, also those that come when its data are gone.
        losses: (step, nats per answer token).
    """

    scores: dict[str, Tensor]
    sketch: Sketch
    losses: list[tuple[int, float]]

    def save(self, path: Path, sketch_path: Path, probe: ProbeConfig) -> None:
        """Write the scores and, before them, the sketch; with the fingerprint of the proxy and how it was probed."""
        self.sketch.save(sketch_path)
        header: dict[str, Any] = {"format": f"trace_dist.{KIND}", "model": self.sketch.model}
        header |= {"probe": asdict(probe), "losses": self.losses}
        save_sealed(path, self.scores, header)

    @classmethod
    def load(cls, path: Path, sketch_path: Path, model: str, probe: ProbeConfig) -> Probed | None:
        """Read it; None where there is none of this proxy, probed in this way.

        Raises:
            ValueError: the file is damaged.
        """
        if not (path.is_file() and sketch_path.is_file()):
            return None
        tensors, header = load_sealed(path, KIND, bare=True)
        if not same_model(str(header.get("model")), model) or header.get("probe") != asdict(probe):
            return None
        with reading(path, KIND):
            losses = [(int(step), float(loss)) for step, loss in header["losses"]]
        return cls(tensors, Sketch.load(sketch_path), losses)


def probe_task(
    module: nn.Module,
    model_id: str,
    layouts: Mapping[str, UnitLayout],
    batches: Batches,
    probe: ProbeConfig,
    train: TrainConfig,
    dtype: str = "float32",
    description: str = "warm start",
) -> Probed:
    """Warm-start the proxy on one task, score its units and put it back bit for bit.

    Args:
        module: the proxy.
        model_id: its fingerprint.
        layouts: its maskable parameters; all others stay frozen.
        batches: the task's, of ``probe.batch_size``.
        probe: steps, learning rate, Fisher batches and score.
        train: the remaining options of the loop.
        dtype: data type of matmuls; the weights are fp32.
        description: label of progress and errors.
    """
    trace = warm_start(module, list(layouts), batches, probe, train, dtype, description)
    sketch = sketch_update(trace.update, SKETCH_SEED, model_id)
    return Probed(unit_importance(trace, dict(layouts), probe.score), sketch, trace.losses)
