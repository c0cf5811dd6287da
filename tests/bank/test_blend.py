"""One set of weights for a batch of prompts."""

from __future__ import annotations

import pytest
import torch
from bank.samples import base_model, drawn, make_delta, same_bits, same_delta
from bank.test_composition import dense_change

from trace_dist import Delta, DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.bank.blend import blended, task_weights, weights_of
from trace_dist.bank.composition import compose
from trace_dist.sharding import ShardedModel


@pytest.fixture(scope="module")
def model() -> ShardedModel:
    return base_model()


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, model: ShardedModel) -> DeltaBank:
    bank = DeltaBank.create(tmp_path_factory.mktemp("blend") / "bank", "aaaa", 1)
    bank.add(drawn(BASE, 0), None)
    for seed, task in enumerate("ab", 1):
        bank.add(drawn(task, seed), make_delta(model, task, seed, density=0.3))
    return bank


def prompts(bank: DeltaBank, *tasks: str) -> torch.Tensor:
    """As many prompts of each task, each right in the middle of it."""
    return torch.stack([bank.signature(task).means[0] for task in tasks])


def delta_of(bank: DeltaBank, task: str) -> Delta:
    delta = bank.delta(task)
    assert delta is not None
    return delta


def test_weights_are_mean_probabilities(bank: DeltaBank) -> None:
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(3)) * 4 + 10
    odds = bank.retriever.scores(x).exp()
    expected = (odds / odds.sum(dim=1, keepdim=True)).mean(dim=0)
    found = task_weights(bank, x, most=3, least=0.0)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found == pytest.approx({task: expected[index].item() for index, task in enumerate(bank.tasks)})
    two = task_weights(bank, x, most=2, least=0.0)
    assert list(two) == list(found)[:2]
    assert sum(two.values()) == pytest.approx(1)


def test_the_least_probability_takes_part() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    assert weights_of("abcd", scores, most=4, least=0.25) == {"a": 0.5, "b": 0.25, "c": 0.25}
    assert weights_of("abcd", scores, most=4, least=0.26) == {"a": 1.0}
    assert list(weights_of("abcd", scores, most=4, least=0.0)) == ["a", "b", "c"]


def test_a_task_that_is_certain_is_its_delta(bank: DeltaBank, model: ShardedModel) -> None:
    before = model.full_state_dict()
    assert same_delta(blended(bank, model, prompts(bank, "a", "a")), bank.delta("a"))
    assert blended(bank, model, prompts(bank, BASE)) is None
    assert same_bits(model.full_state_dict(), before, "float32")


def test_a_batch_of_two_tasks_takes_of_each_its_share(bank: DeltaBank, model: ShardedModel) -> None:
    base = model.full_state_dict()
    found = blended(bank, model, prompts(bank, "a", "b", "b", "b"))
    assert found is not None
    changes = {task: dense_change(delta_of(bank, task), base) for task in "ab"}
    for name, change in dense_change(found, base).items():
        expected = 0.25 * changes["a"][name] + 0.75 * changes["b"][name]
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)
    # The base takes its share as well: what is left is half of the change.
    half = blended(bank, model, prompts(bank, "a", BASE))
    assert half is not None
    for name, change in dense_change(half, base).items():
        torch.testing.assert_close(change, 0.5 * changes["a"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sum", "ties", "magnitude_max"])
def test_how_changes_become_one_is_a_part(bank: DeltaBank, model: ShardedModel, kind: str) -> None:
    base = model.full_state_dict()
    found = blended(bank, model, prompts(bank, "a", "b"), kind=kind)
    assert found is not None
    whole = compose([delta_of(bank, task) for task in "ab"], model, "whole", kind)
    for name, change in dense_change(found, base).items():
        torch.testing.assert_close(change, 0.5 * dense_change(whole, base)[name], rtol=1e-5, atol=1e-6)


def test_what_is_asked_wrongly(bank: DeltaBank, model: ShardedModel) -> None:
    x = prompts(bank, "a", "b")
    for options, message in (
        ({"most": 0}, "^most=0: must be at least 1"),
        ({"least": 1.0}, r"^least=1.0: must lie in \[0, 1\)"),
        ({"kind": "linear"}, "choose among sum, average, ties, dare, magnitude_max"),
    ):
        with pytest.raises(ValueError, match=message):
            blended(bank, model, x, **options)  # type: ignore[arg-type]
