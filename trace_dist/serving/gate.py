"""What is checked of a request before anything else: the key, and its size. All requests are counted here."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
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
LINGER_SECONDS, LINGER_BYTES = 5.0, 2**26
"""How long, and how much, is read of a body that is refused: whoever still sends would hear of a broken connection alone."""
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
        more = True

        async def heard() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        try:
            if (scope["path"], scope["query_string"]) not in OPEN:
                self._check_key(headers.get(b"authorization", b""))
            body = await _in_time(self._body(headers, heard))
        except ApiError as error:
            await _refuse(error, heard if more and error.status != 408 else None, send)
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


async def _refuse(error: ApiError, receive: Receive | None, send: Send) -> None:
    """Send why, before what is left of the body is passed by; ``receive`` is None where that is not waited for."""
    body = json.dumps(error.body).encode()
    # The body is not read to its end, so nothing else can follow on this connection.
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with suppress(TimeoutError):
        if receive is not None:
            await asyncio.wait_for(_passed_by(receive), LINGER_SECONDS)
    await send({"type": "http.response.body", "body": b""})


async def _passed_by(receive: Receive) -> None:
    """Read what still comes of a body, and keep nothing of it."""
    read, more = 0, True
    while more and read <= LINGER_BYTES:
        message = await receive()
        read += len(message.get("body", b""))
        more = message.get("more_body", False)
