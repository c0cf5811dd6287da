"""Readers of what is sent to the server."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from fastapi.testclient import TestClient
from fuzz.reader import Reader
from serving import small

from trace_dist.serving.api import make_app
from trace_dist.serving.gate import Gate
from trace_dist.serving.options import Listening, Source
from trace_dist.serving.router import Router
from trace_dist.serving.tally import Tally
from trace_dist.serving.worker import Worker
from trace_dist.utils.files import write_json


@cache
def served() -> TestClient:
    """A bank behind its server, without the socket."""
    folder = Path(mkdtemp())
    atexit.register(rmtree, folder)
    made = small.make(folder)
    source, limits = Source(str(made.bank), str(made.base)), Listening(max_tokens=2, max_n=2)
    router, tally = Router.of(source), Tally()
    worker = Worker(router, limits, tally)
    worker.start()
    app = Gate(make_app(router, worker, limits, tally), None, limits.max_body_kib * 1024, tally)
    client = TestClient(app, raise_server_exceptions=False)
    # One loop for all requests, as a server has it.
    client.__enter__()
    atexit.register(worker.close)
    atexit.register(client.__exit__)
    return client


def make_request(chat: bool) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        asked: dict[str, Any] = {
            "model": "copy",
            "max_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "n": 1,
            "seed": 3,
        }
        asked |= {"stop": ["x"], "stream": False, "user": "u", "logprobs": False}
        if chat:
            asked["messages"] = [{"role": "user", "content": "copy abc"}]
        else:
            asked |= {"prompt": ["copy abc", "fed"], "stream_options": {"include_usage": True}}
        write_json(folder / "asked.json", asked)
        return folder / "asked.json"

    return make


def read_request(path: str) -> Callable[[Path], None]:
    """A refusal has OpenAI's shape, one line, and a status that says whose fault it is."""

    def read(file: Path) -> None:
        answer = served().post(path, content=file.read_bytes(), headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 404, 413, 422), f"{answer.status_code} {answer.text[:200]}"
        if answer.status_code != 200:
            message = answer.json()["error"]["message"]
            assert "\n" not in message, message
            raise ValueError(message)

    return read


READERS = (
    Reader("request of a completion", "json", make_request(chat=False), read_request("/v1/completions")),
    Reader("request of a chat", "json", make_request(chat=True), read_request("/v1/chat/completions")),
)
