"""A prompt's task by each task's own weights, as the bank compares them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bank.samples import adapted_bank, base_model, prompts_of, represent_rows, same_bits, small_delta

from trace_dist import DeltaBank, Router
from trace_dist.bank.adapted import retrieve_adapted
from trace_dist.bank.bank import BASE
from trace_dist.bank.signature import fit_signature
from trace_dist.models.tokenizer import char_tokenizer
from trace_dist.serving.finding import Route
from trace_dist.serving.options import Sampling, Source
from trace_dist.serving.row import Row

NUM_TASKS = 3
ASKED = [[44] * 9, *(prompt for task in range(NUM_TASKS) for prompt in prompts_of(task, 6, seed=50))]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> DeltaBank:
    return adapted_bank(tmp_path_factory.mktemp("finding") / "bank", base_model(), NUM_TASKS)


def router(bank: DeltaBank, **options: object) -> Router:
    tokenizer = char_tokenizer({"any": ["any"]}, [])
    chosen = {"representation": "adapted", "batch_size": 8} | options
    source = Source(str(bank.folder), "base", **chosen)  # type: ignore[arg-type]
    return Router(DeltaBank(bank.folder), base_model(), tokenizer, source)


@pytest.mark.parametrize("reject", [None, 0.25])
def test_prompts_find_the_task_that_their_weights_say(bank: DeltaBank, reject: float | None) -> None:
    model = base_model()
    run = represent_rows(model, ASKED)
    expected = retrieve_adapted(bank, model, run(range(len(ASKED))), run, candidates=2, reject=reject)
    asked = router(bank, candidates=2, reject=reject)
    before = asked.model.full_state_dict()
    routes = asked.routes(ASKED, [None] * len(ASKED))
    assert [route.task for route in routes] == expected
    assert [route.rejected for route in routes] == [name == BASE for name in expected]
    assert (BASE in expected) == (reject is not None)
    assert len(set(expected) - {BASE}) == NUM_TASKS
    assert all(route.margin is not None and route.margin >= 0 for route in routes)
    # The base's own comparison is another.
    assert any(route.margin != each.margin for route, each in zip(routes, by_base(bank), strict=True))
    assert same_bits(asked.model.full_state_dict(), before, "float32")


def by_base(bank: DeltaBank) -> list[object]:
    source = Source(str(bank.folder), "base", representation="base", batch_size=8)
    asked = Router(bank, base_model(), char_tokenizer({"any": ["any"]}, []), source)
    return list(asked.routes(ASKED, [None] * len(ASKED)))


def test_prompts_are_represented_as_the_tasks_were_learned(tmp_path: Path) -> None:
    """Without a word: by the tasks' own weights while all of them have such signatures, by the base's from then on."""
    bank = adapted_bank(tmp_path / "bank", base_model(), 2)
    asked, ids = router(bank, representation="auto", candidates=2), ASKED[:3]
    told, names = router(bank, candidates=2), [None] * 3
    assert asked.routes(ids, names) == told.routes(ids, names)
    assert asked.answer(*_written(asked)).error_bound is None
    x = torch.randn(20, bank.signature("t0").dim)
    bank.add(fit_signature(x, 1, 0, "old"), small_delta("old", 1))
    assert asked.refresh()
    assert asked.routes(ids, names) == router(bank, representation="base").routes(ids, names)
    assert asked.answer(*_written(asked)).error_bound is not None


def _written(asked: Router) -> tuple[Row, Route]:
    """An answer of one token, and its route."""
    row = asked.row([44] * 9, Sampling(max_new_tokens=1))
    asked.write("t0", [row], Sampling(max_new_tokens=1))
    return row, Route("t0")


def test_one_candidate_has_no_second_and_no_bound(bank: DeltaBank) -> None:
    asked = router(bank, candidates=1)
    assert {route.margin for route in asked.routes(ASKED, [None] * len(ASKED))} == {None}
    (answer,) = asked.ask(["any"])
    assert answer.error_bound is None


def test_a_task_that_was_learned_without_is_named_and_others_can_be_asked(tmp_path: Path) -> None:
    bank = adapted_bank(tmp_path / "bank", base_model(), 2)
    asked = router(bank)
    x = torch.randn(20, bank.signature("t0").dim)
    bank.add(fit_signature(x, 1, 0, "old"), small_delta("old", 1))
    assert asked.refresh()
    with pytest.raises(
        ValueError, match=r"no signature of old under its own weights; set bank\.representation: base"
    ):
        asked.routes(ASKED, [None] * len(ASKED))
    assert asked.routes(ASKED[:1], ["t1"])[0].task == "t1"
