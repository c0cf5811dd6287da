"""What a forward pass costs beside its products: the operators that it launches.

A small model is nowhere near the rate at which a device multiplies matrices: most of its time goes to starting operators, each
of which does next to nothing. They are counted on the meta device, without memory, and priced with what one takes on this machine
(``profiling.speed.Machine``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trace_dist.utils.meta_values import MetaValues

NUM_TOKENS = 16
OPERATORS_PER_MODULE = 6
"""Of a module without children, where a family's code does not run on the meta device."""


class _Counter(TorchDispatchMode):
    """Counts the operators while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self._values = MetaValues()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return self._values.run(func, args, kwargs or {})


def num_operators(model: nn.Module) -> int:
    """Operators that a forward pass launches, whatever the number of tokens.

    Args:
        model: a causal LM on the meta device.
    """
    ids = torch.zeros(1, NUM_TOKENS, dtype=torch.int64, device="meta")
    counter = _Counter()
    try:
        with torch.no_grad(), counter:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    # A family's code, which may need values, other inputs than tokens or another length.
    except Exception:
        return OPERATORS_PER_MODULE * sum(1 for module in model.modules() if not any(module.children()))
    return counter.operators
