"""The end of a server: what was asked is answered first, and nobody who neither sends nor reads can put the end off."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
PATIENCE_SECONDS = 10.0
"""Given to clients that send or read slowly, once nothing is left to be answered."""


class Server(uvicorn.Server):
    """Uvicorn's, which by itself waits for as long as a client keeps its connection.

    Args:
        config: of uvicorn.
        num_open: how many prompts are yet to be answered.
    """

    def __init__(self, config: uvicorn.Config, num_open: Callable[[], int]) -> None:
        super().__init__(config)
        self._num_open = num_open

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; connections on which nothing happens are cut."""
        patience = asyncio.ensure_future(self._lose_patience())
        try:
            await super().shutdown(sockets)
        finally:
            patience.cancel()

    async def _lose_patience(self) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()
        while loop.time() < last + PATIENCE_SECONDS:
            await asyncio.sleep(0.1)
            if self._num_open():
                last = loop.time()
        connections: list[Any] = list(self.server_state.connections)
        logger.warning("%d clients that neither send nor read are cut off", len(connections))
        for connection in connections:
            # What waits for it, in either direction, is told that the client has gone.
            connection.transport.abort()
