"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) on the masked entries of a sharded model.

Gradients, both moments and the fp32 master copy are compact: they exist for masked entries only, on the rank that owns them.
The update runs inside this rank's partition; every other weight stays bit-identical, weight decay included.

    model = shard(AutoModelForCausalLM.from_pretrained(...), backend="zero3")
    optimizer = MaskedAdamW(model, mask, lr=1e-3)
    model.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from trace_kernels.compact import compact_gather, compact_scatter
from trace_kernels.masked_adamw import masked_adamw

from trace_dist.utils import dist

if TYPE_CHECKING:
    from trace_dist.masks.format import Mask
    from trace_dist.sharding.base import ShardedModel
    from trace_dist.sharding.compaction import Support


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW over a mask; a plain ``torch.optim.Optimizer`` to LR schedulers and training loops.

    Each parameter group entry is a compact fp32 master copy, [entries of this rank]; its ``.grad`` is the compact
    gradient that ``model.backward`` accumulates. State per entry: ``exp_avg`` and ``exp_avg_sq`` (fp32).

    Args:
        model: a sharded model; the mask is attached to it, replacing any other.
        mask: which entries to train.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled, on masked entries only.
        max_grad_norm: global norm over the masked entries of all ranks above which gradients are scaled down; None for no limit.

    Raises:
        ValueError: the mask does not fit the model, or a hyperparameter is out of range.
    """

    def __init__(
        self,
        model: ShardedModel,
        mask: Mask,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        _check_hyperparameters(lr, betas, eps, weight_decay, max_grad_norm)
        self.model = model
        self.mask = mask
        self.max_grad_norm = max_grad_norm
        self.grad_norm = 0.0
        """Global gradient norm over masked entries before clipping, at the last step."""
        self.supports = model.attach(mask)
        masters = [self._master(support) for support in self.supports]
        super().__init__(masters, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        for master in masters:
            self.state[master] = {
                "step": 0,
                "exp_avg": torch.zeros_like(master.data),
                "exp_avg_sq": torch.zeros_like(master.data),
            }

    def _master(self, support: Support) -> nn.Parameter:
        master = nn.Parameter(compact_gather(self.model.local(support.name), support.runs))
        master.grad = support.grad
        return master

    def compact(self) -> list[tuple[Support, nn.Parameter, dict[str, Any]]]:
        """(support, master, state) per masked parameter, in the model's order."""
        masters = self.param_groups[0]["params"]
        return [
            (support, master, self.state[master])
            for support, master in zip(self.supports, masters, strict=True)
        ]

    def _check_ready(self) -> None:
        if not self.model.is_attached(self.supports):
            raise ValueError(
                "MaskedAdamW: another mask was attached to the model since; build a new optimizer for each mask"
            )
        if self.model.has_unreduced_gradients():
            raise ValueError(
                "MaskedAdamW: some gradients were not summed over the ranks; call model.backward(loss) on the sharded "
                "model instead of loss.backward()"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from the accumulated gradients. Collective.

        Raises:
            ValueError: another optimizer has taken over the model, or ``loss.backward()`` was called instead of
                ``model.backward(loss)`` on several ranks.
        """
        self._check_ready()
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        grad_scale = self._clip_scale()
        group = self.param_groups[0]
        for support, master, state in self.compact():
            state["step"] += 1
            masked_adamw(
                self.model.local(support.name),
                support.runs,
                master.data,
                support.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=state["step"],
                grad_scale=grad_scale,
            )
        self.model.refresh([support.name for support in self.supports])
        return result

    def _clip_scale(self) -> float:
        """Factor that brings the global norm over masked entries down to ``max_grad_norm``; records the norm."""
        squares = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for support in self.supports:
            squares += support.grad.double().square().sum()
        self.grad_norm = float(dist.sum_over_ranks(squares).sqrt())
        if self.max_grad_norm is None:
            return 1.0
        return min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the compact gradients; the buffers stay."""
        for support in self.supports:
            support.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, master copy and mask digest; for resuming on another number of ranks use ``train.checkpoint``."""
        packed = super().state_dict()
        packed["masters"] = [master.data for _, master, _ in self.compact()]
        packed["mask_digest"] = self.mask.digest()
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore ``state_dict`` and write the master copy back into the model.

        Raises:
            ValueError: the state belongs to another mask, or to another partition of it.
        """
        if state_dict.get("mask_digest") != self.mask.digest():
            raise ValueError(
                "optimizer state: it was saved for another mask; build MaskedAdamW with the mask it was saved with"
            )
        masters: list[Tensor] = state_dict["masters"]
        if [saved.shape for saved in masters] != [master.shape for _, master, _ in self.compact()]:
            raise ValueError(
                "optimizer state: it was saved on another rank or number of ranks; resume with train.checkpoint, which "
                "loads on any number"
            )
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for (_, master, _), saved in zip(self.compact(), masters, strict=True):
            master.data.copy_(saved)
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the master copy into the model's weights. Collective."""
        for support, master, _ in self.compact():
            compact_scatter(self.model.local(support.name), support.runs, master.data)
        self.model.refresh([support.name for support in self.supports])


def _check_hyperparameters(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, max_grad_norm: float | None
) -> None:
    if not lr >= 0:
        raise ValueError(f"lr={lr!r}: must not be negative; use for example 1e-3")
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise ValueError(f"betas={betas!r}: both must lie in [0, 1); use for example (0.9, 0.999)")
    if not eps > 0:
        raise ValueError(f"eps={eps!r}: must be positive; use for example 1e-8")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r}: must not be negative; use 0 for none")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={max_grad_norm!r}: must be positive; use None for no clipping")
