"""``olora``: O-LoRA (arXiv 2310.14152): adapters per task, all of them added to the base, in subspaces that are kept orthogonal.

    loss + strength * sum over layers and earlier tasks t of |A_t A^T|^2

``A`` [rank, inputs] of the present task spans what its adapters read. Each task draws one of its own: with that of an earlier
task it would begin in that task's subspace. Adapters of earlier tasks are frozen and lie in the base's weights. What is kept
of them is what they are made of. A head that is trained whole, as that of images, goes on from task to task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trace_dist.continual.methods import lora
from trace_dist.continual.methods.adapted import ADAPTER, refuse_shared
from trace_dist.masks.ops import tensor_seed
from trace_dist.train.workbench import Stream
from trace_dist.utils.rng import random_numbers_kept


@dataclass(frozen=True)
class Options(lora.Options):
    """Of ``olora``."""

    section: ClassVar[str] = "continual.options.olora"

    strength: float = 0.5
    """Factor of the penalty, which is added to the loss in nats per answer token; with 0 subspaces may overlap."""

    def check(self) -> None:
        super().check()
        self.at_least(0, "strength")


class OLoRA(lora.LoRA):
    """Orthogonal adapters. ``memory`` holds those of earlier tasks, [tasks, ...] each."""

    label = "O-LoRA"

    def config(self, module: Any) -> Any:
        refuse_shared(self.name, module)
        return super().config(module)

    def begin(self, stream: Stream) -> None:
        if self.setting.bench.before(stream):
            self._freeze()

    @torch.no_grad()
    def _freeze(self) -> None:
        """Add the last task's adapters to the weights, and begin new ones."""
        self.memory = {
            name: torch.cat([self.memory[name], each[None]]) if self.memory else each.detach().clone()[None]
            for name, each in self.trained().items()
            if lora.is_adapter(name)
        }
        self._fold()
        self._draw()

    def _draw(self) -> None:
        """Make the adapters new ones, which add nothing and read what no earlier ones were drawn to read."""
        with random_numbers_kept():
            torch.manual_seed(tensor_seed(self.setting.cfg.seed, f"adapters/{self._number_frozen}"))
            for layer in self.layers().values():
                layer.reset_lora_parameters(ADAPTER, True)

    @property
    def _number_frozen(self) -> int:
        """Earlier tasks whose adapters lie in the weights."""
        return len(next(iter(self.memory.values()), ()))

    @torch.no_grad()
    def _fold(self) -> None:
        """Add the adapters as they are to the weights."""
        for layer in self.layers().values():
            layer.get_base_layer().weight.add_(layer.get_delta_weight(ADAPTER))

    @torch.no_grad()
    def penalise(self) -> None:
        for name, parameter in self.trained().items():
            if self.memory and lora.is_a(name) and parameter.grad is not None:
                slope = overlap_slope(parameter, self.memory[name].flatten(0, 1))
                parameter.grad.add_(slope, alpha=self.options.strength)

    @torch.no_grad()
    def restore(self, kept: Mapping[str, Tensor]) -> None:
        if self.memory:
            # their adapters lie in its weights
            self.drop()
        super().restore(kept)
        present = {name: each.detach().clone() for name, each in self.trained().items()}
        for number in range(self._number_frozen):
            self.put({name: each[number] for name, each in self.memory.items()})
            self._fold()
        self.put(present)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "adapters": 1 + self._number_frozen}


def overlap_slope(a: Tensor, earlier: Tensor) -> Tensor:
    """Gradient of |earlier a^T|^2 for ``a`` [rank, inputs]; ``earlier`` [n, inputs]."""
    return 2 * (a @ earlier.T) @ earlier


METHOD = OLoRA
