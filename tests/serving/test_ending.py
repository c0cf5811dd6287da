"""Clients that neither send nor read: a server that is told to end ends, and one that goes on lets go of them."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import pytest
import uvicorn

from trace_dist.serving import ending, gate
from trace_dist.serving.gate import Gate
from trace_dist.serving.options import Listening
from trace_dist.serving.server import _bound
from trace_dist.serving.tally import Tally

HALF = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n{"
WHOLE = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\n{}"


async def _endless(scope: Any, receive: Any, send: Any) -> None:
    """Answers with more than a connection takes."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("sent", [HALF, WHOLE])
def test_a_client_that_neither_sends_nor_reads_does_not_put_off_the_end(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ending, "PATIENCE_SECONDS", 0.5)
    num_open, app = 1, Gate(_endless, None, 1 << 20, Tally())
    server = ending.Server(uvicorn.Config(app, log_level="warning"), lambda: num_open)
    with _bound(Listening(port=0)) as place:
        place.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        with socket.create_connection(place.getsockname()) as client:
            client.sendall(sent)
            while not server.server_state.tasks:
                time.sleep(0.01)
            server.should_exit = True
            thread.join(2)
            # Something is still being answered.
            assert thread.is_alive()
            num_open = 0
            thread.join(30)
            assert not thread.is_alive()
    assert not [record for record in caplog.records if record.exc_info]


def test_a_request_that_does_not_come_whole_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.1)
    sent, received = list[Any](), iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Any:
        return next(received, None) or await asyncio.sleep(1000)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/completions", "headers": [], "query_string": b""}
    app = Gate(_endless, None, 1 << 20, Tally())
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
    assert (sent[0]["status"], (b"connection", b"close") in sent[0]["headers"]) == (408, True)
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"


def test_connections_are_watched() -> None:
    """A client that is switched off says nothing; without this its connection stays for ever."""
    with _bound(Listening(port=0)) as place:
        place.listen()
        with socket.create_connection(place.getsockname()):
            taken, _ = place.accept()
            with taken:
                assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
