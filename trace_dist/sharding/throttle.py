"""The host stays a few blocks ahead of the accelerator.

[Note: blocks ahead] DeepSpeed frees a gathered block as soon as the host has launched what uses it; the memory is free when the
accelerator has come as far. Nothing else holds the host back, and a gather waits for no computation: with a few hundred launches
on their way, many blocks' weights would lie there at once. So the host waits, before each block, until the accelerator has come
to the one two before it. The accelerator itself never runs out of work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

AHEAD = 2
"""Blocks that the host may have launched beyond the one that the accelerator is in."""


class Throttle:
    """Holds the host back at every block, forward and backward.

    Args:
        blocks: the model's.
        new_event: makes an event, with ``record()`` and ``synchronize()``.
    """

    def __init__(self, blocks: Iterable[nn.Module], new_event: Callable[[], Any]) -> None:
        self._new_event = new_event
        self._begun: deque[Any] = deque()
        for block in blocks:
            block.register_forward_pre_hook(self._forward)
            block.register_forward_hook(self._watch_backward)

    def wait(self) -> None:
        """A block begins."""
        event = self._new_event()
        event.record()
        self._begun.append(event)
        if len(self._begun) > AHEAD:
            self._begun.popleft().synchronize()

    @torch.compiler.disable
    def _forward(self, *_: Any) -> None:
        self.wait()

    @torch.compiler.disable
    def _watch_backward(self, *args: Any) -> None:
        leaves = [t for t in tree_leaves(args[-1]) if isinstance(t, Tensor) and t.requires_grad]
        if leaves and torch.is_grad_enabled():
            leaves[0].register_hook(lambda _: self.wait())
