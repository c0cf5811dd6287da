"""``osft``: PEFT's OSF: full fine-tuning of the lower singular directions alone (Sculpting Subspaces, arXiv 2504.07097).

Each linear layer's weight is taken apart, W = U S V. The top directions stay; the others are trained and kept orthogonal to them.
After each task the weights are put together and taken apart anew, so what a task has made large is what later ones leave alone.

PEFT projects the gradients. Adam does not keep a direction, so here U and V are projected after each step, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trace_dist.config.checks import check
from trace_dist.continual.methods.adapted import ADAPTER, Adapted, linear_layers, refuse_shared
from trace_dist.continual.methods.options import Replayed
from trace_dist.train.learner import DenseLearner
from trace_dist.train.workbench import Stream
from trace_dist.utils.finite import NotFinite


@dataclass(frozen=True)
class Options(Replayed):
    """Of ``osft``."""

    section: ClassVar[str] = "continual.options.osft"

    keep: float = 0.5
    """Share of the singular directions of each layer that stay as they are, in (0, 1)."""

    def check(self) -> None:
        super().check()
        check(0 < self.keep < 1, f"{self.where}.keep", self.keep, "must lie in (0, 1)", "use for example 0.5")


class OSFT(Adapted):
    """Orthogonal subspace fine-tuning."""

    label = "OSFT"
    colour = "green"

    def config(self, module: Any) -> Any:
        from peft import OSFConfig  # slow to import, and needed here alone

        refuse_shared(self.name, module)
        # a gate of one output has one direction, which cannot be shared out
        widths = {name: min(shape) for name, shape in linear_layers(module).items() if min(shape) > 1}
        least, keep = min(widths.values(), default=2), self.options.keep
        rule = f"keeps no direction of the narrowest layer, which has {least}"
        cure = f"use at least {math.ceil(1000 / least) / 1000:g}"
        check(int(least * keep) > 0, "continual.options.osft.keep", keep, rule, cure)
        return OSFConfig(effective_rank=keep, target_modules=list(widths))

    def prepare(self, module: Any) -> nn.Module:
        try:
            return super().prepare(module)
        except torch.linalg.LinAlgError as error:
            raise NotFinite(
                f"{self.lr_field}: a weight that the training has left has no singular values ({error}); lower it"
            ) from None

    def learner(self, lr: float) -> DenseLearner:
        learner = super().learner(lr)
        learner.optimizer.register_step_post_hook(lambda *_: self.project())
        return learner

    @torch.no_grad()
    def project(self) -> None:
        """Take the frozen directions out of those that are trained."""
        for layer in self.layers().values():
            u, v = (layer.osf_svd_params[ADAPTER][name] for name in ("U_low", "V_low"))
            # on a side whose directions are all known, PEFT keeps those that are not frozen alone
            u_high, v_high = dict(layer._osf_U_high).get(ADAPTER), dict(layer._osf_V_high).get(ADAPTER)
            u.copy_(outside(u, u_high, layer._osf_U_low_init[ADAPTER]))
            v_high = None if v_high is None else v_high.T
            v.copy_(outside(v.T, v_high, layer._osf_V_low_init[ADAPTER].T).T)

    def end(self, stream: Stream, learner: DenseLearner) -> None:
        self._module = self.prepare(self.module.merge_and_unload())

    def kept(self) -> dict[str, Tensor]:
        # between tasks the singular directions are those of the weights
        return {name: layer.get_base_layer().weight for name, layer in self.layers().items()}

    @torch.no_grad()
    def restore(self, kept: Mapping[str, Tensor]) -> None:
        plain = self.module.unload()
        for name, value in kept.items():
            plain.get_submodule(name).weight.copy_(value)
        self._module = self.prepare(plain)


def outside(value: Tensor, high: Tensor | None, low: Tensor) -> Tensor:
    """What of the columns of ``value`` [n, m] lies outside the frozen directions.

    Args:
        value: what is projected.
        high: [n, k] orthonormal frozen directions; None where ``low`` are all others.
        low: [n, l] orthonormal directions that are not frozen.
    """
    return low @ (low.T @ value) if high is None else value - high @ (high.T @ value)


METHOD = OSFT
