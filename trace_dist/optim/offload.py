"""Optimizer states in host memory: gradients come down, new values go up, and nothing else crosses the bus.

Per masked entry the device keeps the gradient (4 bytes) alone; the host keeps master and moments, and two staging buffers in
pinned memory. All gradients are sent first, on a stream of their own; while the host updates one parameter, the gradients of
the next ones arrive and the values of the one before leave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from trace_kernels.compact import compact_gather, compact_scatter
from trace_kernels.runs import Runs

from trace_dist.sharding.support import Support


@dataclass(eq=False)
class HostEntries:
    """One parameter's masked entries of this rank in host memory.

    Attributes:
        values: [n] in the dtype of the weight: what the weight holds; pinned where the weight is on a GPU.
        grad: [n] the gradient of the step being taken; pinned likewise.
        runs: the n entries as one stretch that starts at their place among the parameter's masked entries, so that stochastic
            rounding does not depend on the number of ranks.
    """

    values: Tensor
    grad: Tensor
    runs: Runs

    @classmethod
    def of(cls, support: Support, local: Tensor, runs: Runs) -> HostEntries:
        """Copy the present values of a support, the entries ``runs`` of ``local``, down."""
        pin = local.is_cuda
        count, start = support.runs.num_entries, support.offset
        whole = max(support.num_entries, 1)
        unit = torch.zeros(min(count, 1), dtype=torch.int32)
        values = torch.empty(count, dtype=local.dtype, pin_memory=pin)
        values.copy_(compact_gather(local, runs))
        grad = torch.empty(count, dtype=support.grad.dtype, pin_memory=pin)
        return cls(values, grad, Runs.clip(unit, whole, start, start + count, max(whole, start + count)))


class Offload:
    """The host's side of every support."""

    def __init__(self, supports: list[Support], storage: Callable[[Support], tuple[Tensor, Runs]]) -> None:
        self._storage = storage
        self.entries = {support.name: HostEntries.of(support, *storage(support)) for support in supports}
        device = supports[0].grad.device if supports else torch.device("cpu")
        self._downward = torch.cuda.Stream(device) if device.type == "cuda" else None

    def step(self, supports: list[Support], update: Callable[[Support, HostEntries], None]) -> None:
        """Update all supports on the host and write the new values into the weights.

        Args:
            supports: in the order of the update.
            update: takes a step on ``entries.values`` with ``entries.grad``.
        """
        arrived = self._send_gradients(supports)
        for support, event in zip(supports, arrived, strict=True):
            if event is not None:
                event.synchronize()
            entries = self.entries[support.name]
            update(support, entries)
            self.write_back(support)

    def write_back(self, support: Support) -> None:
        """Send the values of one support up, into the weight."""
        local, runs = self._storage(support)
        compact_scatter(local, runs, self.entries[support.name].values.to(local.device, non_blocking=True))

    def _send_gradients(self, supports: list[Support]) -> list[torch.cuda.Event | None]:
        if self._downward is None:
            for support in supports:
                self.entries[support.name].grad.copy_(support.grad)
            return [None] * len(supports)
        events: list[torch.cuda.Event | None] = []
        self._downward.wait_stream(torch.cuda.current_stream(self._downward.device))
        with torch.cuda.stream(self._downward):
            for support in supports:
                self.entries[support.name].grad.copy_(support.grad, non_blocking=True)
                events.append(self._downward.record_event())
        return events
