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
from trace_dist.probe.learning import HeldOut, Learning
from trace_dist.probe.warm_start import warm_start
from trace_dist.utils.files import load_tensors, reading
from trace_dist.utils.sealed import check_header, load_sealed, save_sealed

KIND = "trace"
SKETCH_SEED = 0
"""Of all sketches: only those of one seed compare, and a bank outlives the seeds of its runs."""


@dataclass(frozen=True)
class Tensors:
    """The probed tensors as wholes.

    Attributes:
        scores: parameter -> TRACE's importance of it (score l2_plus_fisher).
        shapes: parameter -> its shape.
    """

    scores: dict[str, float]
    shapes: dict[str, list[int]]

    @classmethod
    def load(cls, path: Path) -> Tensors:
        """From the file of a trace. Raises ValueError where it is damaged, or of an earlier version."""
        _, header = load_tensors(path, KIND, lambda name: False)
        if "tensors" not in header:
            raise ValueError(f"{path}: says nothing of whole tensors; start `trace-dist probe` again")
        check_header(header, path, KIND)
        with reading(path, KIND):
            return cls(**header["tensors"])


@dataclass(frozen=True)
class Probed:
    """What is kept of a warm start.

    Attributes:
        scores: parameter -> importance of its units, [num_units] fp32.
        sketch: of the update, with which other tasks are compared, also those that come when its data are gone.
        losses: (step, nats per answer token).
        tensors: the same of whole tensors.
        learning: how it did on held-out examples; None where it was not measured.
    """

    scores: dict[str, Tensor]
    sketch: Sketch
    losses: list[tuple[int, float]]
    tensors: Tensors
    learning: Learning | None = None

    def save(self, path: Path, sketch_path: Path, probe: ProbeConfig, examples: str | None = None) -> None:
        """Write the scores and, before them, the sketch; with the fingerprint of the proxy, how it was probed, and a digest of
        the task's examples."""
        # An earlier one says how it was made for both.
        path.unlink(missing_ok=True)
        self.sketch.save(sketch_path)
        header: dict[str, Any] = {"format": f"trace_dist.{KIND}", "model": self.sketch.model}
        header |= {"probe": _how(probe), "losses": self.losses, "tensors": asdict(self.tensors)}
        header["learning"] = None if self.learning is None else self.learning.to_json()
        header["examples"] = examples
        save_sealed(path, self.scores, header)

    @classmethod
    def load(
        cls, path: Path, sketch_path: Path, model: str, probe: ProbeConfig, examples: str | None = None
    ) -> Probed | None:
        """Read it; None where there is none of this proxy, probed in this way on these examples (on any where None).

        Raises:
            ValueError: the file is damaged.
        """
        if not (path.is_file() and sketch_path.is_file()):
            return None
        tensors, header = load_sealed(path, KIND, bare=True)
        same = same_model(str(header.get("model")), model) and header.get("probe") == _how(probe)
        # A trace of an earlier version says nothing of its examples, and nothing of whole tensors.
        same = same and (examples is None or header.get("examples") in (None, examples))
        if not same or "tensors" not in header:
            return None
        with reading(path, KIND):
            losses = [(int(step), float(loss)) for step, loss in header["losses"]]
            whole = Tensors(**header["tensors"])
            # One of an earlier version says nothing of it.
            kept = header.get("learning")
            learning = None if kept is None else Learning.from_json(kept)
        return cls(tensors, Sketch.load(sketch_path), losses, whole, learning)


def _how(probe: ProbeConfig) -> dict[str, Any]:
    """Of the options those on which a trace depends."""
    return {key: value for key, value in asdict(probe).items() if key not in ("margin", "unlearned")}


def probe_task(
    module: nn.Module,
    model_id: str,
    layouts: Mapping[str, UnitLayout],
    batches: Batches,
    probe: ProbeConfig,
    train: TrainConfig,
    dtype: str = "float32",
    description: str = "warm start",
    measured: Batches | None = None,
    heldout: HeldOut | None = None,
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
        measured, heldout: as of ``warm_start``.
    """
    trace = warm_start(module, list(layouts), batches, probe, train, dtype, description, measured, heldout)
    sketch = sketch_update(trace.update, SKETCH_SEED, model_id)
    whole = {name: UnitLayout(layout.shape, layout.numel) for name, layout in layouts.items()}
    scores = {name: float(score) for name, score in unit_importance(trace, whole, "l2_plus_fisher").items()}
    tensors = Tensors(scores, {name: list(layout.shape) for name, layout in layouts.items()})
    return Probed(
        unit_importance(trace, dict(layouts), probe.score), sketch, trace.losses, tensors, trace.learning
    )
