"""The thread that owns the model: who is answered with whom, and what a failure leaves."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from bank.samples import same_bits
from serving.small import CAP, TASKS, Small, prompts

from trace_dist import DeltaBank, Router
from trace_dist.serving.api import Api, make_app
from trace_dist.serving.finding import Shares
from trace_dist.serving.gate import Gate
from trace_dist.serving.options import Listening, Sampling
from trace_dist.serving.protocol import ApiError, CompletionRequest
from trace_dist.serving.row import Row
from trace_dist.serving.tally import Tally
from trace_dist.serving.worker import Busy, Job, Worker

SHORT = Sampling(max_new_tokens=CAP)
Batch = tuple[str, int]


@pytest.fixture(scope="module")
def router(small: Small) -> Router:
    return Router.open(small.bank, small.base, batch_size=4)


class Bench:
    """A worker that has not begun, and what it wrote."""

    def __init__(self, router: Router, monkeypatch: pytest.MonkeyPatch, **limits: Any) -> None:
        self.router, self.batches, write = router, list[Batch](), router.write
        self.fails = False

        def noted(task: str, rows: Sequence[Row], sampling: Sampling, shares: Shares = ()) -> None:
            self.batches.append((task, len(rows)))
            write(task, rows, sampling, shares)

        monkeypatch.setattr(router, "write", noted)
        forward = router.model.module.forward

        def sometimes(*args: Any, **kwargs: Any) -> Any:
            if self.fails and kwargs.get("use_cache", True):
                raise RuntimeError("out of memory")
            return forward(*args, **kwargs)

        monkeypatch.setattr(router.model.module, "forward", sometimes)
        self.worker = Worker(router, Listening(**limits), Tally())

    def job(self, text: str, task: str | None = None, sampling: Sampling = SHORT, num: int = 1) -> Job:
        (ids,) = self.router.encode([text])
        return Job(ids, task, sampling, num)


@pytest.fixture
def bench(router: Router, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    before = {name: value.clone() for name, value in router.model.module.state_dict().items()}
    made = Bench(router, monkeypatch)
    yield made
    made.worker.close()
    assert made.worker.num_open == 0
    assert same_bits(before, router.model.module.state_dict(), "float32")


def test_a_batch_holds_one_task_and_one_way_of_drawing(bench: Bench, small: Small) -> None:
    texts = {task: prompts(task, 3, seed=2) for task in TASKS[:3]}
    turns = [(task, texts[task][number]) for number in range(3) for task in texts]
    jobs = [bench.job(text, task if number % 2 else None) for number, (task, text) in enumerate(turns)]
    hot = Sampling(max_new_tokens=CAP, temperature=1.0)
    drawn = [bench.job("copy abcd", "copy", hot) for _ in range(2)]
    seeded = [bench.job("copy abcd", "copy", Sampling(CAP, 1.0, seed=3), num=2) for _ in range(2)]
    bench.worker.submit([*jobs, *drawn, *seeded])
    bench.worker.start()
    for (task, text), job in zip(turns, jobs, strict=True):
        (answer,) = job.done.result(60)
        assert (answer.task, answer.text) == (task, small.expected(task, [text])[0])
    first, second = ([answer.text for answer in job.done.result(60)] for job in seeded)
    assert first == second
    assert [len(job.done.result(60)) for job in drawn] == [1, 1]
    assert bench.batches == [("copy", 3), ("twist", 3), ("plain", 3), ("copy", 2), ("copy", 2), ("copy", 2)]


def test_no_batch_is_larger_than_it_may_be(bench: Bench) -> None:
    jobs = [bench.job(text, "copy", num=2) for text in prompts("copy", 3)]
    bench.worker.submit(jobs)
    bench.worker.start()
    assert [len(job.done.result(60)) for job in jobs] == [2, 2, 2]
    assert bench.batches == [("copy", 4), ("copy", 2)]


def test_what_fails_is_told_and_the_next_is_answered(bench: Bench, small: Small) -> None:
    bench.worker.start()
    bench.fails = True
    job = bench.job("copy abcd", "copy")
    bench.worker.submit([job])
    with pytest.raises(RuntimeError, match="out of memory"):
        job.done.result(60)
    wrong, right = bench.job("copy abcd", "nobody"), bench.job("copy abcd")
    bench.fails = False
    bench.worker.submit([wrong, right])
    with pytest.raises(ValueError, match="task='nobody': the bank does not hold it"):
        wrong.done.result(60)
    assert right.done.result(60)[0].text == small.expected("copy", ["copy abcd"])[0]
    assert bench.worker.broken is None


def test_weights_that_are_not_the_base_answer_nothing_more(bench: Bench) -> None:
    bench.worker.start()
    weight = bench.router.model.module.model.norm.weight
    kept = weight.data.clone()
    bench.worker.call(lambda: weight.data.fill_(7.0)).result(60)
    bench.fails = True
    jobs = [bench.job("copy abcd", "copy") for _ in range(2)]
    for job in jobs:
        bench.worker.submit([job])
        with pytest.raises(RuntimeError):
            job.done.result(60)
        bench.fails = False
    assert bench.worker.broken is not None
    with torch.no_grad():
        weight.data.copy_(kept)


def test_all_who_ask_for_the_weights_at_once_wait_for_one_look(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look reads every weight; asked for more often than that takes, they kept answers waiting for ever."""
    looks = list[None]()
    monkeypatch.setattr(bench.worker, "check_weights", lambda: looks.append(None))
    api = Api(bench.router, bench.worker, Listening())

    async def ask() -> list[Any]:
        waiting = [asyncio.ensure_future(api.health(weights=True)) for _ in range(5)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        bench.worker.start()
        found = await asyncio.gather(*waiting[1:])
        return [*found, await api.health(weights=True)]

    assert [answer.status_code for answer in asyncio.run(asyncio.wait_for(ask(), 60))] == [200] * 5
    assert len(looks) == 2


def test_what_nobody_waits_for_any_more_does_not_end_the_thread(bench: Bench, small: Small) -> None:
    unwanted, wanted = (bench.worker.call(lambda: 7) for _ in range(2))
    assert unwanted.cancel()
    bench.worker.start()
    assert wanted.result(60) == 7
    job = bench.job("copy abcd", "copy")
    bench.worker.submit([job])
    assert job.done.result(60)[0].text == small.expected("copy", ["copy abcd"])[0]


def test_too_many_are_refused_and_the_unwanted_are_passed_by(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(router, monkeypatch, max_waiting=3)
    jobs = [bench.job("copy abcd", "copy") for _ in range(3)]
    bench.worker.submit(jobs[:2])
    with pytest.raises(Busy, match="2 prompts are waiting, 3 may"):
        bench.worker.submit([bench.job("copy abcd"), bench.job("copy abcd")])
    bench.worker.submit(jobs[2:])
    jobs[1].cancel()
    bench.worker.start()
    assert jobs[2].done.result(60)
    assert jobs[1].done.cancelled()
    assert bench.batches == [("copy", 2)]
    # Half written: the others of its batch go on.
    going, begun = bench.job("copy abcd", "copy"), threading.Event()
    going.on_text = lambda number, piece: (begun.set(), going.cancel())
    bench.worker.submit([going])
    assert going.done.result(60)[0].finish in ("cancelled", "stop")
    assert begun.is_set()
    bench.worker.close()
    assert bench.worker.num_open == 0


def test_what_cannot_be_taken_on_is_not_read(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of a megabyte takes a second to tokenise, which no full server should spend."""
    bench = Bench(router, monkeypatch, max_waiting=1)
    bench.worker.submit([bench.job("copy abcd", "copy")])
    monkeypatch.setattr(router, "encode", lambda _: pytest.fail("it was read"))
    api = Api(router, bench.worker, Listening(max_waiting=1))
    asked = CompletionRequest(model="copy", prompt="copy ab")
    with pytest.raises(ApiError, match="1 prompts are waiting") as refused:
        asyncio.run(api.answer(asked, ["copy ab"], False, cast(Any, None)))
    assert refused.value.status == 429


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_not_answered(stream: bool, bench: Bench) -> None:
    """A stream that has begun ends of itself; before, the prompt still waits, and nothing is written."""
    tally = Tally()
    app = Gate(make_app(bench.router, bench.worker, Listening(), tally), None, 1 << 20, tally)
    path, sent = "/v1/completions", list[Any]()
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    asked = {"model": "copy", "prompt": ["copy ab", "copy cd"], "max_tokens": CAP, "stream": stream}
    body = json.dumps(asked).encode()
    received = iter([{"type": "http.request", "body": body}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(received)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
    assert sent[0]["status"] == 499, sent
    assert bench.worker.num_open == 2
    bench.worker.start()
    bench.worker.close()
    assert bench.batches == []


@pytest.mark.parametrize("during", ["plain", "copy"])
def test_a_prompt_whose_task_is_removed_while_it_waits_is_anothers(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    """Who asked for no task by name cannot be told that there is none of this name; also where it goes as its delta is read."""
    folder = Path(shutil.copytree(small.bank, tmp_path / "bank"))
    router = Router.open(folder, small.base, batch_size=4)
    bench = Bench(router, monkeypatch)
    write = router.write

    def removed(task: str, *args: Any) -> None:
        bank = DeltaBank(folder)
        if task == during and "copy" in bank.tasks:
            bank.remove("copy")
        write(task, *args)

    monkeypatch.setattr(router, "write", removed)
    first, named, found = bench.job("plain ab", "plain"), bench.job("copy ab", "copy"), bench.job("copy ab")
    # Other sampling, so it is of a later batch than the others.
    later = bench.job("copy ab", sampling=Sampling(temperature=0.5, seed=1))
    bench.worker.submit([first, named, found, later])
    bench.worker.start()
    (answer,) = found.done.result(60)
    assert answer.text == small.expected(answer.task, ["copy ab"])[0]
    assert answer.task != "copy" != later.done.result(60)[0].task
    assert first.done.result(60)[0].task == "plain"
    with pytest.raises(ValueError, match="task='copy': the bank does not hold it"):
        named.done.result(60)
    bench.worker.close()


def test_a_batch_waits_a_moment_for_others(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(router, monkeypatch, max_wait_ms=60_000)
    bench.worker.start()
    jobs = [bench.job(text, "copy") for text in prompts("copy", 4)]
    for job in jobs:
        bench.worker.submit([job])
    assert all(job.done.result(30) for job in jobs)
    assert bench.batches == [("copy", 4)]
    last = bench.job("copy abcd")
    bench.worker.submit([last])
    bench.worker.close()  # does not wait for others any more
    assert last.done.result(0)
