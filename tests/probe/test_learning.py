"""What a probe has learned is measured on examples that it has not seen, beside a guess that reads no prompt."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from probe.setting import make_batches, make_config, make_model, make_task

from trace_dist.config import ProbeConfig
from trace_dist.models.roles import maskable
from trace_dist.probe.learning import HeldOut, Learning, chance_loss
from trace_dist.probe.warm_start import warm_start


def nats(model: torch.nn.Module, rows: list) -> float:
    """Mean over answer tokens, one example after the other."""
    found = []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
            found += [-float(logits[i - 1, y]) for i, y in enumerate(row["labels"]) if y != -100]
    return sum(found) / len(found)


def test_chance_is_the_smoothed_share_of_each_token_at_its_position() -> None:
    trained, heldout = make_task(40, length=3), make_task(9, length=5, seed=1)
    answers = [[y for y in labels if y != -100] for labels in trained["labels"]]
    columns = [[answer[i] for answer in answers if len(answer) > i] for i in range(3)]
    expected = []
    for labels in heldout["labels"]:
        for i, token in enumerate(y for y in labels if y != -100):
            column = columns[min(i, 2)]
            expected.append(-math.log((column.count(token) + 1) / (len(column) + len(set(column)) + 1)))
    assert max(len(answer) for answer in answers) == 3  # the held-out ones are longer
    assert chance_loss(trained, heldout) == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_the_loss_is_taken_before_and_after_and_changes_nothing() -> None:
    probe, train = ProbeConfig(steps=5, lr=1e-2, fisher_batches=2), make_config().train
    rows = make_task(7, seed=3)
    step = next(make_batches(batch_size=7, micro_batch_size=3, num_examples=7, seed=3))
    runs = []
    for heldout in (None, HeldOut(step, 7, 2.0)):
        model = make_model()
        runs.append(
            warm_start(model, maskable(model, "linear"), make_batches(), probe, train, heldout=heldout)
        )
    plain, judged = runs
    assert plain.learning is None
    assert plain.losses == judged.losses
    for name, evidence in plain.evidence.items():
        assert torch.equal(evidence.update, judged.evidence[name].update)
        assert torch.equal(evidence.fisher, judged.evidence[name].fisher)
    found, model = judged.learning, make_model().eval()
    assert found is not None
    assert (found.chance, found.examples) == (2.0, 7)
    assert found.before == pytest.approx(nats(model, rows.to_list()), rel=1e-4)
    tuned = model.state_dict()
    for name, update in judged.update.items():
        tuned[name] += update
    assert found.after == pytest.approx(nats(model, rows.to_list()), rel=1e-3)
    assert found.after != pytest.approx(found.before, rel=1e-3)


def test_a_margin_is_a_share_of_chance() -> None:
    found = Learning(3.0, 1.8, 2.0, 9)
    assert found.is_learned(0.1)
    assert not found.is_learned(0.11)
    assert Learning.from_json(found.to_json()) == found
    assert str(found) == "loss 3.00 -> 1.80 on 9 held-out examples, chance 2.00"


def test_rows_ahead_are_those_that_the_next_batches_give() -> None:
    batches, other = make_batches(num_examples=30), make_batches(num_examples=30)
    next(batches), next(other)
    ahead = batches.rows_ahead(2)
    given = chain.from_iterable((next(other), other.last_rows())[1] for _ in range(2))
    assert ahead == set(given)
    assert len(ahead) == 16
