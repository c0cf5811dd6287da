"""What a warm start shows of the elements of one parameter; every score is computed from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from trace_dist.probe.learning import Learning


@dataclass(frozen=True)
class Evidence:
    """Four tensors of one shape, fp32: of the parameter, or of some of its elements.

    Attributes:
        weight: before the warm start.
        update: weight after minus weight before.
        gradient: mean over batches of the gradient of the mean loss, after the warm start.
        fisher: mean over batches of its square (empirical Fisher information).
        mean_square: of the weights before the warm start, of all ranks together; None where ``weight`` holds all of them.
    """

    weight: Tensor
    update: Tensor
    gradient: Tensor
    fisher: Tensor
    mean_square: float | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Trace:
    """What a warm start shows of one task.

    Everything is on the CPU, since the traces of all tasks are compared.

    Attributes:
        evidence: parameter -> what scores are computed from.
        losses: (step, nats per answer token).
        learning: how it did on held-out examples; None where there were none.
    """

    evidence: dict[str, Evidence]
    losses: list[tuple[int, float]]
    learning: Learning | None = None

    @property
    def update(self) -> dict[str, Tensor]:
        """Parameter -> fp32 weight after minus weight before."""
        return {name: each.update for name, each in self.evidence.items()}
