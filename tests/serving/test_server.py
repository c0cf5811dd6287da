"""A server as a user starts it, asked by OpenAI's own client; one process for all of these tests."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from cli.program import environment
from serving.small import CAP, MORE, TASKS, Small, make, prompts

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.models.fingerprint import fingerprint
from trace_dist.serving.options import Listening, Source
from trace_dist.serving.server import _key, serve

KEY = "kept to ourselves"
BEARER = {"Authorization": f"Bearer {KEY}"}
GENERATION = len((BASE, *TASKS, *MORE))
"""Of the bank, after the task that is added."""
LIMITS = ("--batch_size", "6", "--max_tokens", "200", "--max_n", "3", "--max_body_kib", "16")


@dataclass(frozen=True)
class Server:
    """The process, where it listens, and what it serves."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    small: Small

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=None)

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=None)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path, headers=BEARER)

    def post(self, path: str, content: bytes) -> httpx.Response:
        headers = BEARER | {"Content-Type": "application/json"}
        return self.http.post(path, content=content, headers=headers)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    # A bank of its own: a task is added to it.
    small = make(folder, MORE)
    command = [
        sys.executable,
        "-m",
        "trace_dist",
        "serve",
        "--bank",
        str(small.bank),
        "--base",
        str(small.base),
    ]
    variables = environment(folder / "cache") | {"TRACE_DIST_API_KEY": KEY}
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--port", "0", *LIMITS], stderr=file, text=True, env=variables)
    try:
        yield Server(process, _address(process, log), log, small)
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[str], log: Path) -> str:
    """Where it listens, however long it takes to begin; what it said, where it has ended instead."""
    while True:
        ended = process.poll() is not None
        found = re.search(r"on (http://\S+)/v1", log.read_text())
        if found:
            # Whoever is told the address may ask at once.
            socket.create_connection(("127.0.0.1", int(found[1].rpartition(":")[2]))).close()
            return found[1]
        assert not ended, log.read_text()
        time.sleep(0.1)


def ask(client: openai.OpenAI, model: str, text: str, number: int) -> str:
    """One of four kinds of requests."""
    turns: Any = [{"role": "user", "content": text}]
    if number % 4 == 0:
        return client.completions.create(model=model, prompt=text, max_tokens=CAP).choices[0].text
    if number % 4 == 1:
        pieces = client.completions.create(model=model, prompt=text, max_tokens=CAP, stream=True)
        return "".join(piece.choices[0].text for piece in pieces)
    if number % 4 == 2:
        answer = client.chat.completions.create(model=model, messages=turns, max_completion_tokens=CAP)
        return str(answer.choices[0].message.content)
    chunks = client.chat.completions.create(model=model, messages=turns, max_tokens=CAP, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_two_hundred_at_once_are_answered_as_by_the_merged_models(server: Server) -> None:
    names = (*TASKS[:3], *MORE, BASE)
    asked = [(task, prompts(task, 5, seed=3)[number]) for number in range(5) for task in names]
    expected = [server.small.expected(task, [text])[0] for task, text in asked]

    def one(number: int) -> str:
        task, text = asked[number % len(asked)]
        return ask(server.client, "auto" if number % 2 else task, text, number // len(asked))

    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(one, range(200)))
    assert found == [expected[number % len(asked)] for number in range(200)]
    assert len(set(expected)) > 20
    state = server.get("/health?weights=true")
    assert (state.status_code, state.json()["status"], state.json()["open"]) == (200, "ok", 0)
    assert state.json()["weights"] == fingerprint(server.small.base)


def test_an_answer_says_how_it_came_about(server: Server) -> None:
    texts = [prompts("copy", 1)[0], prompts("twist", 1)[0]]
    answer = server.client.completions.create(model="auto", prompt=texts, n=2, max_tokens=CAP)
    expected = [server.small.expected(task, [text])[0] for task, text in zip(TASKS, texts, strict=False)]
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (number, expected[number // 2]) for number in range(4)
    ]
    how = [choice.model_extra["trace_dist"] for choice in answer.choices if choice.model_extra]
    assert [found["task"] for found in how] == ["copy", "copy", "twist", "twist"]
    assert all(
        found["margin"] > 0 and 0 < found["error_bound"] < 1 and not found["rejected"] for found in how
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 4 * CAP
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    stop = expected[1][1:3]
    cut = server.client.completions.create(model="twist", prompt=texts[1], stop=stop, max_tokens=CAP)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (expected[1].partition(stop)[0], "stop")
    turns: Any = [{"role": "user", "content": [{"type": "text", "text": texts[0]}]}]
    chunks = list(
        server.client.chat.completions.create(
            model="copy", messages=turns, max_tokens=CAP, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[0].choices[0].delta.role == "assistant"
    ends = [choice for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert [choice.finish_reason for choice in ends] == [answer.choices[0].finish_reason]
    assert ends[0].model_extra is not None
    assert ends[0].model_extra["trace_dist"]["task"] == "copy"


def test_the_pages_client_is_answered(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1]
    code = code.replace("http://127.0.0.1:8000", server.url).replace('"none"', repr(KEY))
    exec(compile(code, "serving.md", "exec"), {})
    assert "'margin'" in capsys.readouterr().out


def test_draws_follow_their_seed(server: Server) -> None:
    def drawn(seed: int) -> list[str]:
        options: Any = {"model": "copy", "prompt": "copy abcd", "max_tokens": CAP, "temperature": 1.0, "n": 3}
        return [choice.text for choice in server.client.completions.create(seed=seed, **options).choices]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 1


def test_a_task_that_is_added_is_served_at_once(server: Server) -> None:
    def names() -> list[str]:
        return [model.id for model in server.client.models.list()]

    text = prompts("later", 1, seed=4)[0]
    assert names() == ["auto", BASE, *TASKS[:3], *MORE]
    with pytest.raises(openai.NotFoundError, match="model='later': there is no such model"):
        ask(server.client, "later", text, 0)
    DeltaBank(server.small.bank).add(*server.small.parts("later"))
    expected = server.small.expected("later", [text])[0]
    assert names() == ["auto", BASE, *TASKS[:3], *MORE, "later"]
    assert server.client.models.retrieve("later").id == "later"
    assert [ask(server.client, model, text, 2) for model in ("later", "auto")] == [expected, expected]
    assert server.get("/health").json()["generation"] == GENERATION


CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
GOOD = '"model": "copy", "prompt": "copy ab"'


@pytest.mark.parametrize(
    ("path", "content", "status", "fragment"),
    [
        (COMPLETE, "{", 400, "the request is not valid JSON"),
        (COMPLETE, "[1]", 400, "valid dictionary"),
        (COMPLETE, "[" * 9000, 400, "error parsing the body"),
        (COMPLETE, '{"prompt": "a"}', 400, "model: Field required"),
        (COMPLETE, '{"model": "copy"}', 400, "prompt: Field required"),
        (COMPLETE, '{"model": "copy", "prompt": []}', 400, "prompt: is an empty list"),
        (COMPLETE, '{"model": "copy", "prompt": [5, 6]}', 400, "prompt: Input should be a valid string"),
        (COMPLETE, '{"model": "copy", "prompt": "half \\ud83d"}', 400, "prompt"),
        (COMPLETE, '{"model": "\\ud83d", "prompt": "a"}', 404, "there is no such model"),
        (COMPLETE, '{"model": "copy", "prompt": "copy %s"}' % ("a" * 300), 400, "do not fit the model's 256"),
        (COMPLETE, f'{{{GOOD}, "max_tokens": 201}}', 400, r"max_tokens=201: must lie in \[1, 200\]"),
        (COMPLETE, f'{{{GOOD}, "max_tokens": 0}}', 400, "max_tokens=0"),
        (COMPLETE, f'{{{GOOD}, "max_tokens": "5"}}', 400, "max_tokens: Input should be a valid integer"),
        (COMPLETE, f'{{{GOOD}, "n": 4}}', 400, "n=4: may be 3 at most"),
        (COMPLETE, f'{{{GOOD}, "temperature": NaN}}', 400, "temperature"),
        (COMPLETE, f'{{{GOOD}, "temperature": 1e999}}', 400, "temperature"),
        (COMPLETE, f'{{{GOOD}, "top_p": 0}}', 400, "top_p"),
        (COMPLETE, f'{{{GOOD}, "seed": {2**64}}}', 400, "seed"),
        (COMPLETE, f'{{{GOOD}, "stop": ""}}', 400, "stop"),
        (COMPLETE, f'{{{GOOD}, "stop": [{", ".join(17 * [chr(34) + "x" + chr(34)])}]}}', 400, "stop: .* at most 16 items"),
        (COMPLETE, f'{{{GOOD}, "logprobs": 3}}', 400, "logprobs: Extra inputs are not permitted"),
        (COMPLETE, f'{{{GOOD}, "logprobs": 0}}', 400, "logprobs: Extra inputs are not permitted"),
        (COMPLETE, f'{{{GOOD}, "pad": "{"x" * 17000}"}}', 413, "longer than 16384 bytes"),
        (CHAT, '{"model": "nobody", "messages": [{"role": "user", "content": "a"}]}', 404, "model='nobody'"),
        (CHAT, '{"model": "copy", "messages": [{"role": "user", "content": [{"type": "image"}]}]}', 400, r"content\.0\.type"),
        (CHAT, '{"model": "copy", "messages": []}', 400, "messages: List should have at least 1 item"),
        (CHAT, '{"model": "copy", "messages": [{"role": "judge", "content": "a"}]}', 400, "roles are user and"),
        (CHAT, '{"model": "copy", "messages": [{"role": "assistant", "content": "a"}]}', 400, "assistant's turn"),
        ("/v1/nothing", "{}", 404, "POST '/v1/nothing': Not Found"),
        ("/v1/models", "{}", 405, "Method Not Allowed"),
    ],
)  # fmt: skip
def test_what_is_broken_is_refused_in_openais_shape(
    path: str, content: str, status: int, fragment: str, server: Server
) -> None:
    found = server.post(path, content.encode())
    assert (found.status_code, set(found.json())) == (status, {"error"}), found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(fragment, error["message"]), error
    assert server.get("/health?weights=true").json()["status"] == "ok"


def test_a_body_that_is_not_said_to_be_json(server: Server) -> None:
    """`curl --data` alone says that it is a form; the error was of dictionaries and fields."""
    content = f"{{{GOOD}}}".encode()
    for told in ("application/x-www-form-urlencoded", "text/plain"):
        found = server.http.post(COMPLETE, content=content, headers=BEARER | {"Content-Type": told})
        assert found.status_code == 400
        assert "send the header Content-Type: application/json" in found.json()["error"]["message"]
    found = server.http.post(COMPLETE, headers=BEARER | {"Content-Type": "application/json"})
    assert (found.status_code, found.json()["error"]["message"]) == (
        400,
        "the request has no body; send a JSON object",
    )


@pytest.mark.parametrize(("key", "status"), [(KEY, 413), ("wrong", 401)])
def test_who_sends_a_large_body_hears_why_it_is_refused(key: str, status: int, server: Server) -> None:
    """The connection was reset while the client was still sending."""
    host, port = server.http.base_url.host, server.http.base_url.port
    assert port is not None
    with closing(HTTPConnection(host, port, timeout=60)) as connection:
        connection.request("POST", COMPLETE, b" " * 2**24, {"Authorization": f"Bearer {key}"})
        found = connection.getresponse()
        assert (found.status, set(json.loads(found.read()))) == (status, {"error"})


def test_what_changes_nothing_is_taken(server: Server) -> None:
    """Fields that clients send with the value that leaving them out has."""
    expected = server.small.expected("copy", ["copy abcd"])[0]
    options: Any = {"frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": None, "user": "me", "n": 1}
    further: Any = {"repetition_penalty": 1.0, "parallel_tool_calls": False, "function_call": "none"}
    streamed: Any = {"include_obfuscation": False, "include_usage": None}
    answer = server.client.completions.create(
        model="copy",
        prompt="copy abcd",
        max_tokens=CAP,
        extra_body=further | {"stream_options": streamed},
        **options,
    )
    assert answer.choices[0].text == expected


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/copy", "/metrics"])
def test_what_can_be_read_can_be_looked_at(path: str, server: Server) -> None:
    """Load balancers and monitors ask by HEAD."""
    headers = {"Authorization": f"Bearer {KEY}"}
    found = server.http.head(path, headers=headers)
    assert (found.status_code, found.content) == (200, b"")
    wrong = server.http.delete(path, headers=headers)
    assert wrong.status_code == 405
    assert {method.strip() for method in wrong.headers["allow"].split(",")} == {"GET", "HEAD"}


def test_only_this_machine_reaches_it(server: Server) -> None:
    """Nobody has given a host."""
    listening = [
        place.laddr.ip
        for place in psutil.Process(server.process.pid).net_connections()
        if place.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


def test_nobody_asks_without_the_key(server: Server) -> None:
    for key in ("wrong", "x", KEY[:-1], KEY + "x", "ü"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        found = server.http.get("/v1/models", headers=headers)
        assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
    assert server.http.get("/metrics").status_code == 401
    assert server.http.get("/health").status_code == 200


def test_everything_is_counted_and_the_key_is_not_logged(server: Server) -> None:
    text = server.get("/metrics").text
    counts = {
        name: float(value) for name, value in re.findall(r"^(trace_dist_\S+) (\S+)$", text, re.MULTILINE)
    }
    assert counts['trace_dist_requests_total{endpoint="/v1/completions",status="200"}'] >= 20
    assert counts['trace_dist_requests_total{endpoint="other",status="404"}'] >= 1
    assert counts['trace_dist_requests_total{endpoint="/v1/models",status="401"}'] >= 5
    assert counts['trace_dist_answers_total{task="copy"}'] >= 10
    # Answers were written together.
    assert counts["trace_dist_batch_answers_sum"] > counts["trace_dist_batch_answers_count"]
    assert counts["trace_dist_bank_generation"] == GENERATION
    assert counts["trace_dist_open_prompts"] == 0
    assert KEY not in server.log.read_text()


def test_a_server_that_is_told_to_end_answers_first(server: Server) -> None:
    """The last test: SIGTERM comes while an answer is written."""
    asked = prompts("copy", 2, seed=5)
    longest = max(
        zip(server.small.expected("copy", asked, 120), asked, strict=True), key=lambda pair: len(pair[0])
    )
    pieces = server.client.completions.create(model="copy", prompt=longest[1], max_tokens=120, stream=True)
    text = ""
    for piece in pieces:
        if not text:
            server.process.send_signal(signal.SIGTERM)
        text += piece.choices[0].text
    assert text == longest[0]
    assert server.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        server.get("/health")
    log = server.log.read_text()
    assert "all that was asked is answered" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("listening", "fragment"),
    [
        ({"max_n": 20}, "max_n=20: must be at most batch_size=16"),
        ({"port": 70000}, "port=70000: must be below 65536"),
        ({"host": "no.such.host.invalid"}, "host='no.such.host.invalid', port=8000: cannot be listened on"),
        ({"port": None}, r"port=\d+: cannot be listened on \(Address already in use\); choose another"),
        ({"key": " "}, "TRACE_DIST_API_KEY: is set and empty"),
        ({"max_body_kib": 0}, "max_body_kib=0: must be at least 1"),
    ],
)
def test_what_cannot_be_served_is_said_before_the_model_is_loaded(
    listening: dict[str, Any], fragment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {name: value for name, value in listening.items() if name != "key"}
    monkeypatch.setenv("TRACE_DIST_API_KEY", listening.get("key", KEY))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if options.get("port", 0) is None:
            options["port"] = taken.getsockname()[1]
        with pytest.raises(ValueError, match=fragment):
            serve(Source("no bank", "no base"), Listening(**options))


def test_a_key_may_end_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As secrets do that were written to a file; nobody could send such a one."""
    monkeypatch.setenv("TRACE_DIST_API_KEY", f"{KEY}\n")
    assert _key() == KEY


def test_a_base_on_several_ranks_is_not_served() -> None:
    with pytest.raises(
        ValueError, match=r"backend='fsdp2': serve runs in one process.*`generate` runs on ranks"
    ):
        serve(Source("no bank", "no base", backend="fsdp2"), Listening())


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trace_dist.serving.server.PACKAGES", ("fastapi", "no_such_package"))
    with pytest.raises(
        ValueError, match=r"no_such_package is not installed; pip install 'trace-dist\[serve\]'"
    ):
        serve(Source("no bank", "no base"), Listening())
