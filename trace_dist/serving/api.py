"""The HTTP interface: OpenAI's paths, health and metrics. It knows HTTP and nothing of models; the worker does the rest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from trace_dist.bank.bank import DeltaBank
from trace_dist.serving.options import Listening
from trace_dist.serving.protocol import ApiError, ChatRequest, CompletionRequest, Shape, failed
from trace_dist.serving.protocol import Request as Asked
from trace_dist.serving.router import Answer, Router, UnknownTask
from trace_dist.serving.tally import Tally
from trace_dist.serving.watch import Watched
from trace_dist.serving.worker import Busy, Job, Worker
from trace_dist.utils.log import get_logger
from trace_dist.utils.names import AUTO, BASE

logger = get_logger(__name__)
T = TypeVar("T")
Events = asyncio.Queue[tuple[int, str] | None]
"""Number of an answer and the next piece of it; None behind the last one."""
HUNG_UP = 499
"""Status, for ``/metrics`` alone, of a request whose client went before it was answered; nginx counts so."""


class Api:
    """What the paths do.

    Args:
        router: whose bank is served; the model is the worker's, and only what never changes is read here.
        worker: answers.
        limits: of the server.
    """

    def __init__(self, router: Router, worker: Worker, limits: Listening) -> None:
        self._router, self._worker, self._limits = router, worker, limits
        # Of its own: the worker's is in use, in another thread.
        self._watched = Watched(DeltaBank(router.bank.folder))
        self._checking: asyncio.Future[None] | None = None

    def names(self) -> list[str]:
        """Models that can be asked for, as the bank is now."""
        with suppress(ValueError):
            self._watched.refresh()
        return [AUTO, BASE, *(task for task in self._watched.bank.tasks if task not in (AUTO, BASE))]

    def models(self) -> dict[str, Any]:
        """``/v1/models``."""
        return {"object": "list", "data": [self._model(name) for name in self.names()]}

    def model(self, name: str) -> dict[str, Any]:
        """``/v1/models/{name}``."""
        self._check_model(name)
        return self._model(name)

    @staticmethod
    def _model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "trace_dist"}

    def _check_model(self, name: str) -> None:
        names = self.names()
        if name not in names:
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            message = f"model={name!r:.200}: there is no such model; choose among {shown}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def health(self, weights: bool) -> JSONResponse:
        """``/health``; with ``weights`` the worker compares the weights with those that were loaded."""
        if weights and self._worker.broken is None:
            await self._weights_checked()
        broken, bank = self._worker.broken, self._router.bank
        found = {
            "status": "ok" if broken is None else broken,
            "generation": bank.generation,
            "tasks": len(self._router.tasks),
            "open": self._worker.num_open,
            "weights": self._router.fingerprint,
        }
        return JSONResponse(found, 200 if broken is None else 503)

    async def _weights_checked(self) -> None:
        """All who ask while the weights are looked at wait for one look: it takes a while, in which nothing is answered."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.wrap_future(self._worker.call(self._worker.check_weights))
        await asyncio.shield(self._checking)

    async def answer(self, asked: Asked, prompts: Sequence[Any], chat: bool, request: Request) -> Response:
        """A request for answers; who hangs up is not answered further."""
        self._check_model(asked.model)
        events: Events = asyncio.Queue()
        try:
            jobs = await self._jobs(asked, prompts, events if asked.stream else None)
            self._worker.submit(jobs)
        except Busy as error:
            raise ApiError(429, str(error), "server_error", code="busy") from None
        shape = Shape(chat, asked.model)
        if asked.stream:
            pieces = _Pieces(shape, jobs, events, bool(asked.stream_options.include_usage))
            return StreamingResponse(await pieces.begun(request), media_type="text/event-stream")
        try:
            found = await _unless_gone(_answers(jobs), request)
            return JSONResponse(shape.whole(found))
        except Exception as error:
            raise _as_api_error(error) from None
        finally:
            _cancel(jobs)

    async def _jobs(self, asked: Asked, prompts: Sequence[Any], events: Events | None) -> list[Job]:
        if len(prompts) > self._limits.max_waiting:
            message = (
                f"prompt: {len(prompts)} texts, may be {self._limits.max_waiting} at most on this server"
            )
            raise ApiError(400, message, param="prompt")
        # Texts that will not be taken on are not read first.
        self._worker.check_room(len(prompts))
        try:
            encoded = await asyncio.to_thread(self._router.encode, prompts)
        except ValueError as error:
            raise ApiError(
                400, str(error), param="messages" if isinstance(asked, ChatRequest) else "prompt"
            ) from None
        loop = asyncio.get_running_loop()
        task = None if asked.model == AUTO else asked.model
        jobs = []
        for number, ids in enumerate(encoded):
            job = Job(ids, task, self._sampling(asked, ids), asked.n)
            if events is not None:
                first = number * asked.n

                def told(index: int, piece: str, first: int = first) -> None:
                    loop.call_soon_threadsafe(events.put_nowait, (first + index, piece))

                job.on_text = told
            jobs.append(job)
        return jobs

    def _sampling(self, asked: Asked, ids: list[int]) -> Any:
        """Raises ApiError where prompt and answer are longer than the model or the server takes."""
        sampling = asked.sampling(self._limits)
        most = self._limits.max_prompt_tokens
        if most is not None and len(ids) > most:
            message = f"the prompt has {len(ids)} tokens, may have {most} at most on this server"
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")
        try:
            limit = self._router.limit(len(ids), sampling.max_new_tokens, "prompt", self._limits.max_tokens)
        except ValueError as error:
            raise ApiError(400, str(error), param="max_tokens", code="context_length_exceeded") from None
        return replace(sampling, max_new_tokens=limit)


class _Pieces:
    """A stream of server-sent events.

    Args:
        shape: of the answers.
        jobs: what is waited for; they tell ``events`` of their pieces.
        events: number and text of each piece.
        with_usage: whether the last event counts tokens.
    """

    def __init__(self, shape: Shape, jobs: list[Job], events: Events, with_usage: bool) -> None:
        self._shape, self._jobs, self._events, self._with_usage = shape, jobs, events, with_usage
        self._found = _answers(jobs)
        # Behind the last piece, since both come from the worker in this order.
        self._found.add_done_callback(self._ended)

    def _ended(self, found: asyncio.Future[list[list[Answer]]]) -> None:
        _asked_for(found)
        self._events.put_nowait(None)

    async def begun(self, request: Request) -> AsyncIterator[bytes]:
        """The stream, once there is something to send; what fails before is an answer with a status of its own.

        Raises:
            ApiError: nothing was written, or the client hung up before.
        """
        waited = asyncio.ensure_future(self._events.get())
        try:
            first = await _unless_gone(waited, request)
        except BaseException:
            waited.cancel()
            _cancel(self._jobs)
            raise
        if first is None and (error := self._failure()) is not None:
            raise error
        return self._stream(first)

    def _failure(self) -> ApiError | None:
        error = asyncio.CancelledError() if self._found.cancelled() else self._found.exception()
        return None if error is None else _as_api_error(error)

    async def _stream(self, event: tuple[int, str] | None) -> AsyncIterator[bytes]:
        spoken = set[int]()
        try:
            while event is not None:
                index, piece = event
                yield _event(self._shape.piece(index, piece, index not in spoken))
                spoken.add(index)
                event = await self._events.get()
            if (error := self._failure()) is not None:
                yield _event(error.body)
                return
            for last in self._ends(self._found.result(), spoken):
                yield _event(last)
            yield b"data: [DONE]\n\n"
        finally:
            _cancel(self._jobs)

    def _ends(self, found: list[list[Answer]], spoken: set[int]) -> list[dict[str, Any]]:
        ends = []
        for index, answer in enumerate(answer for answers in found for answer in answers):
            # An empty answer has had no piece yet, and a client wants to know who speaks.
            ends += [] if index in spoken else [self._shape.piece(index, "", True)]
            ends.append(self._shape.end(index, answer))
        return ends + ([self._shape.usage(found)] if self._with_usage else [])


def _answers(jobs: Sequence[Job]) -> asyncio.Future[list[list[Answer]]]:
    """Those of each job; the first failure fails all."""
    return asyncio.gather(*(asyncio.wrap_future(job.done) for job in jobs))


async def _unless_gone(found: asyncio.Future[T], request: Request) -> T:
    """What is waited for. Raises ApiError where the client hangs up before."""
    found.add_done_callback(_asked_for)
    # Behind the body, which has been read, nothing else comes.
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((found, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
    if not found.done():
        raise failed("the client hung up", HUNG_UP)
    return found.result()


def _asked_for(found: asyncio.Future[T]) -> None:
    """Whether something failed, asked for even where nobody reads on; asyncio would complain of it."""
    if not found.cancelled():
        found.exception()


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def _cancel(jobs: Sequence[Job]) -> None:
    """Whoever asked has gone, or has everything."""
    for job in jobs:
        job.cancel()


def _as_api_error(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownTask):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, asyncio.CancelledError):
        return failed("the request was cancelled")
    return failed(
        f"the answer could not be written: {error}" if isinstance(error, ValueError) else "internal error"
    )


def make_app(router: Router, worker: Worker, limits: Listening, tally: Tally) -> FastAPI:
    """The application behind the gate."""
    api = Api(router, worker, limits)
    app = FastAPI(title="trace_dist", docs_url=None, redoc_url=None, openapi_url=None)

    async def health(weights: bool = False) -> Response:
        return await api.health(weights)

    def metrics() -> Response:
        return Response(tally.text(), media_type="text/plain; version=0.0.4")

    read: list[tuple[str, Callable[..., Any]]] = [
        ("/v1/models", api.models),
        ("/v1/models/{name}", api.model),
        ("/metrics", metrics),
        ("/health", health),
    ]
    for path, function in read:
        # What watches a server often asks for no more than the status.
        app.add_api_route(path, function, methods=["GET", "HEAD"])

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await api.answer(asked, asked.prompts(), True, request)

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await api.answer(asked, asked.prompts(), False, request)

    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Every error has OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = _said_best(error.errors())
        where = [str(part) for part in first["loc"] if part != "body"]
        if not where and (missed := _no_object(request, first["type"])):
            return _refused(400, missed, None)
        if first["type"] == "json_invalid":
            return _refused(
                400, f"the request is not valid JSON ({first.get('ctx', {}).get('error', '')})", None
            )
        # A union names the alternative that it tried behind the field.
        named = [part for part in where if part not in ("str", "int", "float") and "[" not in part]
        return _refused(400, f"{'.'.join(named) or 'request'}: {first['msg']}", where[0] if where else None)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        body = ApiError(error.status_code, f"{request.method} {request.url.path!r:.200}: {error.detail}").body
        # Of a wrong method they say which ones there are.
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        return JSONResponse(failed("internal error").body, 500)


def _no_object(request: Request, kind: str) -> str | None:
    """Why a body was not even read as JSON; None where it was."""
    told = request.headers.get("content-type", "")
    if kind == "missing":
        return "the request has no body; send a JSON object"
    if "json" not in told.lower():
        return f"content-type={told!r:.80}: the body must be JSON; send the header Content-Type: application/json"
    return None


def _said_best(errors: Sequence[Any]) -> Any:
    """Of what is wrong with a field the most telling: a list where a text may stand too is not told that it is no text."""
    first = errors[0]
    others = [
        each for each in errors if each["loc"][:2] == first["loc"][:2] and each["type"] != "string_type"
    ]
    return others[0] if first["type"] == "string_type" and others else first


def _refused(status: int, message: str, param: str | None) -> JSONResponse:
    return JSONResponse(ApiError(status, message, param=param).body, status)
