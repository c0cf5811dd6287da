"""Probing one task: a warm start of the proxy, and what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trace_dist.config import ProbeConfig, TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.masks.units import UnitLayout
from trace_dist.probe.importance import unit_importance
from trace_dist.probe.warm_start import warm_start
from trace_dist.utils.files import load_tensors, save_tensors

KIND = "trace"


@dataclass(frozen=True)
class Probed:
    """What is kept of a warm start.

    Attributes:
        scores: parameter -> importance of its units, [num_units] fp32.
        update: parameter -> fp32 weight after minus weight before, with which other tasks are compared.
        losses: (step, nats per answer token).
    """

    scores: dict[str, Tensor]
    update: dict[str, Tensor]
    losses: list[tuple[int, float]]

    def save(self, path: Path, model: str, probe: ProbeConfig) -> None:
        """Write it, with the fingerprint of the proxy and how it was probed."""
        tensors = {f"{name}/scores": values for name, values in self.scores.items()}
        tensors |= {f"{name}/update": values for name, values in self.update.items()}
        header: dict[str, Any] = {"format": f"trace_dist.{KIND}", "model": model, "probe": asdict(probe)}
        header["losses"] = self.losses
        save_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: Path, model: str, probe: ProbeConfig) -> Probed | None:
        """Read it; None where there is none of this proxy, probed in this way.

        Raises:
            ValueError: the file is damaged.
        """
        if not path.is_file():
            return None
        tensors, header = load_tensors(path, KIND)
        if (header.get("model"), header.get("probe")) != (model, asdict(probe)):
            return None
        parts: dict[str, dict[str, Tensor]] = {"scores": {}, "update": {}}
        for key, values in tensors.items():
            name, _, part = key.rpartition("/")
            parts[part][name] = values
        losses = [(int(step), float(loss)) for step, loss in header["losses"]]
        return cls(parts["scores"], parts["update"], losses)


def probe_task(
    module: nn.Module,
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
        layouts: its maskable parameters; all others stay frozen.
        batches: the task's, of ``probe.batch_size``.
        probe: steps, learning rate, Fisher batches and score.
        train: the remaining options of the loop.
        dtype: data type of matmuls; the weights are fp32.
        description: label of progress and errors.
    """
    trace = warm_start(module, list(layouts), batches, probe, train, dtype, description)
    return Probed(unit_importance(trace, dict(layouts), probe.score), trace.update, trace.losses)
