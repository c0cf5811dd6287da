"""AdamW steps of many parameters in a few launches, where a GPU computes them (``trace_kernels.adamw_batch``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from trace_kernels.adamw_batch import AdamWBatch
from trace_kernels.dispatch import use_triton
from trace_kernels.hyper import AdamWHyper
from trace_kernels.masked_adamw import Operands, Rounding
from trace_kernels.runs import Runs

from trace_dist.optim.states import State, is_quantized, rounding_of, seed_of

Entry = tuple[str, Tensor, Runs, Tensor, State]
"""Name, local slice of the weight, entries in it, their gradient, their state."""


def can_batch(weight: Tensor, state: State) -> bool:
    """Whether a parameter's step can share a launch: on a GPU, with moments that are no codes."""
    return not is_quantized(state) and use_triton("auto", weight)


class Batches:
    """Takes steps, and keeps the tables of the last one for as long as all operands stay where they are."""

    def __init__(self) -> None:
        self._kept: dict[int, AdamWBatch] = {}

    def step(self, entries: Iterable[Entry], group: dict[str, Any], grad_scale: float | Tensor) -> None:
        """One step of every entry, each for which ``can_batch``, in place; the bits are those of ``states.update``.

        Args:
            entries: the parameters.
            group: lr, betas, eps, weight_decay.
            grad_scale: factor on the gradients.
        """
        kinds: dict[tuple[int, Rounding], list[tuple[Operands, int]]] = {}
        for name, weight, runs, grad, state in entries:
            state["step"] += 1
            moments = (state["exp_avg"], state["exp_avg_sq"])
            operands = Operands(weight, runs, state.get("master"), grad, *moments)
            kind = (state["step"], rounding_of(state, weight))
            kinds.setdefault(kind, []).append((operands, seed_of(name, 0)))
        beta1, beta2 = group["betas"]
        hyper = AdamWHyper(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])
        for number, ((step, rounding), members) in enumerate(kinds.items()):
            together = [operands for operands, _ in members]
            batch = self._kept.get(number)
            if batch is None or not batch.holds(together):
                batch = AdamWBatch(together, [seed for _, seed in members], rounding)
                self._kept[number] = batch
            batch.step(hyper, step, grad_scale)


def sum_of_squares(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Of all entries of some tensors: 0-dim fp64 on ``device``."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(filled, 2, dtype=torch.float64)).square().sum()
