"""Prompts that may be of several tasks, answered by one set of weights out of their deltas."""

from __future__ import annotations

import pytest
from bank.samples import same_bits
from serving.small import CAP, Small, prompts

from trace_dist import Router
from trace_dist.bank.bank import BASE
from trace_dist.bank.blend import blended
from trace_dist.bank.delta import applied
from trace_dist.bank.representation import represent
from trace_dist.data import pad_id
from trace_dist.evaluation import greedy_decode
from trace_dist.serving.finding import Route
from trace_dist.serving.options import Listening, Sampling, Source
from trace_dist.serving.router import Answer
from trace_dist.serving.tally import Tally
from trace_dist.serving.worker import Job, Worker

pytestmark = pytest.mark.usefixtures("base_is_kept")
SHORT = Sampling(max_new_tokens=CAP)
CERTAIN = [prompts(task, 1, seed=1)[0] for task in ("copy", "twist", BASE)]


@pytest.fixture(scope="module")
def router(small: Small) -> Router:
    return Router.open(small.bank, small.base, blend="sum")


@pytest.fixture(scope="module")
def between(router: Router) -> list[str]:
    """Prompts of which two tasks at least have a part: letters of two tasks' prompts, in all shares."""
    first, second = (prompts(task, 1, seed=1)[0] for task in ("copy", "twist"))
    tried = [first * a + second * b for a in range(1, 12) for b in range(1, 12)]
    found = [text for text, route in zip(tried, routes(router, tried), strict=True) if len(route.shares) > 1]
    assert len(found) >= 2
    return found[:2]


def routes(router: Router, texts: list[str]) -> list[Route]:
    return router.routes(router.encode(texts), [None] * len(texts))


def expected(router: Router, text: str, kind: str) -> str:
    """What the model writes under ``blended`` weights."""
    ids = router.encode([text])
    x = represent(router.model.module, ids, layer=0, batch_size=1, pad_id=pad_id(router.tokenizer))
    with applied(router.model, blended(router.bank, router.model, x, kind=kind)):
        written = greedy_decode(router.model.module, router.tokenizer, ids, batch_size=1, max_new_tokens=CAP)
    return str(router.tokenizer.decode(written[0], skip_special_tokens=True))


@pytest.mark.parametrize("kind", ["sum", "magnitude_max"])
def test_answers_are_those_of_blended_weights(small: Small, between: list[str], kind: str) -> None:
    router = Router.open(small.bank, small.base, blend=kind)
    before = {name: value.clone() for name, value in router.model.module.state_dict().items()}
    answers = router.ask([*between, *CERTAIN], sampling=SHORT)
    assert same_bits(before, router.model.module.state_dict(), "float32")
    for text, answer in zip(between, answers, strict=False):
        assert answer.text == expected(router, text, kind)
        assert next(iter(answer.blend)) == answer.task
        assert sum(answer.blend.values()) == pytest.approx(1)
    hard = Router.open(small.bank, small.base)
    for text, answer, task in zip(CERTAIN, answers[len(between) :], ("copy", "twist", BASE), strict=True):
        assert (answer.task, answer.blend) == (task, {})
        assert answer.text == hard.ask([text], sampling=SHORT)[0].text
    assert not any(answer.blend for answer in hard.ask(between, sampling=SHORT))


def test_a_named_task_answers_alone(router: Router, between: list[str]) -> None:
    (answer,) = router.ask(between[:1], ["twist"], SHORT)
    assert (answer.task, answer.blend) == ("twist", {})


def test_a_stream_and_a_server_write_the_same(router: Router, between: list[str]) -> None:
    wanted = router.ask([*between, *CERTAIN], sampling=SHORT)
    stream = router.stream(between[0], sampling=SHORT)
    assert "".join(stream) == wanted[0].text
    check_same(stream.answer, wanted[0])
    worker = Worker(router, Listening(max_wait_ms=1), Tally())
    worker.start()
    jobs = [Job(ids, None, SHORT) for ids in router.encode([*between, *CERTAIN])]
    worker.submit(jobs)
    found = [job.done.result(timeout=60)[0] for job in jobs]
    worker.close()
    for each, answer in zip(found, wanted, strict=True):
        check_same(each, answer)


def check_same(found: Answer, wanted: Answer) -> None:
    """What prompts are represented together with changes the last bits of their probabilities alone."""
    assert (found.text, found.task, found.finish) == (wanted.text, wanted.task, wanted.finish)
    assert found.blend == pytest.approx(wanted.blend, rel=1e-3)


def test_an_unknown_blend_is_refused() -> None:
    with pytest.raises(ValueError, match="choose among sum, average, ties, dare, magnitude_max"):
        Source("bank", "base", blend="linear")
