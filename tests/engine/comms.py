"""Ranks that count what the engine sends, and ranks that fail."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trace_dist.sharding.comm import Comm


class CountedComm(Comm):
    """Counts the bytes of exchanged gradients that leave this rank."""

    def __init__(self) -> None:
        self.bytes_sent = 0

    def all_to_all(
        self, received: Tensor, sent: Tensor, receive_sizes: list[int], send_sizes: list[int]
    ) -> Any:
        self.bytes_sent += (len(sent) - send_sizes[self.rank]) * sent.element_size()
        return super().all_to_all(received, sent, receive_sizes, send_sizes)
