"""What is checked of a request before anything else: the key, and its size. All requests are counted here."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from trace_dist.serving.protocol import ApiError
from trace_dist.serving.tally import Tally

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
"""Paths that are counted by name; anybody can make up others."""
BODY_SECONDS = 60.0
"""How long a request's body may take."""
OPEN = (("/health", b""),)
"""Paths and queries that need no key; what makes the worker do something needs one."""


class Gate:
    """ASGI middleware.

    Args:
        app: what is behind it.
        key: the API key; None lets everybody in.
        max_bytes: of a request's body.
        tally: counts requests.
    """

    def __init__(self, app: Any, key: str | None, max_bytes: int, tally: Tally) -> None:
        self._app, self._max_bytes, self._tally = app, max_bytes, tally
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = self._counted(scope["path"], send)
        headers = dict(scope["headers"])
        try:
            if (scope["path"], scope["query_string"]) not in OPEN:
                self._check_key(headers.get(b"authorization", b""))
            body = await _in_time(self._body(headers, receive))
        except ApiError as error:
            await _refuse(error, send)
            return
        await self._app(scope, _again(body, receive), send)

    def _counted(self, path: str, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._tally.request(path if path in PATHS else "other", message["status"])
            await send(message)

        return counted

    def _check_key(self, given: bytes) -> None:
        if self._key is None:
            return
        scheme, _, key = given.partition(b" ")
        # Compared whatever the scheme is, and in the time that any key takes.
        same = hmac.compare_digest(key.strip(), self._key)
        if scheme.lower() != b"bearer" or not same:
            message = "no valid API key; send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body; one that is too long is not read to its end."""
        told = headers.get(b"content-length", b"0")
        if told.isdigit() and (len(told) > 15 or int(told) > self._max_bytes):
            raise self._too_long()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the request was cut off")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                raise self._too_long()
        return bytes(body)

    def _too_long(self) -> ApiError:
        message = f"the request is longer than {self._max_bytes} bytes, the most that this server reads"
        return ApiError(413, message, code="request_too_large")


async def _in_time(body: Awaitable[bytes]) -> bytes:
    """A body, unless it takes too long to come: whoever begins requests and goes to sleep would keep connections for ever."""
    try:
        return await asyncio.wait_for(body, BODY_SECONDS)
    except TimeoutError:
        message = f"the request has not come whole within {BODY_SECONDS:g} seconds; send it again"
        raise ApiError(408, message, code="request_timeout") from None


def _again(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read, and then whatever comes."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    # The rest of the body is not read, so nothing else can follow on this connection.
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
