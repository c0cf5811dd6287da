"""What a forward pass costs beside its matrix products: the operators that it launches, and the bytes that they write.

A small model is nowhere near the rate at which a device multiplies matrices: most of its time goes to starting operators, each
of which does next to nothing, and to those that only read and write. Both are counted on the meta device, without memory, and
priced with what this machine takes (``profiling.speed.Machine``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trace_dist.utils.meta_values import MetaValues

LENGTHS = (16, 32)
"""Tokens of the two passes whose difference is what a token costs."""
OPERATORS_PER_MODULE = 6
"""Of a module without children, where a family's code does not run on the meta device."""


@dataclass(frozen=True)
class PassCost:
    """A forward pass of a model.

    Attributes:
        operators: that are launched, whatever the number of tokens.
        bytes_per_token: that they write.
    """

    operators: int
    bytes_per_token: float


class _Counter(TorchDispatchMode):
    """Counts the operators, and the bytes of their results, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.written = 0, 0
        self._values = MetaValues()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._values.run(func, args, kwargs or {})
        self.operators += 1
        if not func.is_view:
            self.written += sum(
                each.numel() * each.element_size() for each in tree_iter(result) if isinstance(each, Tensor)
            )
        return result


def forward_cost(model: nn.Module) -> PassCost:
    """The cost of a forward pass.

    Args:
        model: a causal LM on the meta device.
    """
    try:
        counted = [_count(model, length) for length in LENGTHS]
    # A family's code, which may need values, other inputs than tokens or another length.
    except Exception:
        leaves = sum(1 for module in model.modules() if not any(module.children()))
        return PassCost(OPERATORS_PER_MODULE * leaves, 0.0)
    written = counted[1].written - counted[0].written
    return PassCost(counted[0].operators, written / (LENGTHS[1] - LENGTHS[0]))


def _count(model: nn.Module, length: int) -> _Counter:
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    counter = _Counter()
    with torch.no_grad(), counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return counter
