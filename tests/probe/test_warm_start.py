"""The warm start: it measures what it says, and leaves the model as it was."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from probe.setting import make_batches, make_config, make_model, reference_gradients

from trace_dist.config import ProbeConfig, TrainConfig
from trace_dist.masks.ops import layouts_for
from trace_dist.models.roles import maskable
from trace_dist.probe.importance import Trace
from trace_dist.probe.warm_start import warm_start

PROBE = ProbeConfig(steps=5, lr=1e-2, fisher_batches=3)


@pytest.fixture(scope="module", params=[8, 3], ids=["one micro-batch", "three micro-batches"])
def measured(request: pytest.FixtureRequest) -> tuple[Trace, dict, dict, int]:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = maskable(model, "linear")
    train = make_config().train
    trace = warm_start(model, names, make_batches(micro_batch_size=request.param), PROBE, train)
    return trace, before, model.state_dict(), request.param


def test_the_model_is_restored_bit_for_bit(measured: tuple) -> None:
    _, before, after, _ = measured
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_the_update_is_a_real_one(measured: tuple) -> None:
    trace, before, _, _ = measured
    model = make_model()
    assert set(trace.update) == set(layouts_for(model, "element", 1, "linear"))
    tuned = before | {name: before[name] + update for name, update in trace.update.items()}
    model.load_state_dict(tuned)
    first = [loss for _, loss in trace.losses]
    assert len(first) == PROBE.steps
    later = warm_start(model, list(trace.update), make_batches(), PROBE, TrainConfig(micro_batch_size=8))
    assert later.losses[0][1] < first[0] - 0.05
    assert all(update.dtype == torch.float32 and bool(update.any()) for update in trace.update.values())


def test_fisher_is_the_mean_squared_gradient_at_the_point_reached(measured: tuple) -> None:
    trace, before, _, _ = measured
    model = make_model()
    model.load_state_dict(before | {name: before[name] + update for name, update in trace.update.items()})
    batches = make_batches()
    list(islice(batches, PROBE.steps))  # the warm start's own
    gradients = reference_gradients(model, batches, PROBE.fisher_batches)
    for name, evidence in trace.evidence.items():
        expected = sum(g[name].square() for g in gradients) / PROBE.fisher_batches
        largest = float(expected.max())
        torch.testing.assert_close(evidence.fisher.double(), expected, rtol=2e-3, atol=1e-3 * largest)
        mean = sum(g[name] for g in gradients) / PROBE.fisher_batches
        torch.testing.assert_close(evidence.gradient.double(), mean, rtol=2e-3, atol=1e-3 * largest**0.5)
        assert torch.equal(evidence.weight, before[name])


def test_gradients_of_opposite_sign_do_not_cancel(measured: tuple) -> None:
    """|mean g| of an entry may vanish where every batch pulls hard (pitfall 13)."""
    trace, before, _, _ = measured
    model = make_model()
    model.load_state_dict(before | {name: before[name] + update for name, update in trace.update.items()})
    batches = make_batches()
    list(islice(batches, PROBE.steps))
    gradients = reference_gradients(model, batches, PROBE.fisher_batches)
    cancelled = 0
    for name, evidence in trace.evidence.items():
        mean, fisher = sum(g[name] for g in gradients) / PROBE.fisher_batches, evidence.fisher
        assert bool((fisher.double() >= mean.square() * 0.99 - 1e-12).all())
        cancelled += int((fisher.double().sqrt() > 10 * mean.abs()).sum())
    assert cancelled > 100


def test_without_a_warm_start_it_is_measured_at_the_base() -> None:
    model = make_model()
    name = "model.layers.0.mlp.up_proj.weight"
    probe = replace(PROBE, steps=0)
    evidence = warm_start(model, [name], make_batches(), probe, make_config().train).evidence[name]
    gradients = reference_gradients(make_model(), make_batches(), PROBE.fisher_batches)
    expected = sum(g[name].square() for g in gradients) / PROBE.fisher_batches
    assert not evidence.update.any()
    torch.testing.assert_close(
        evidence.fisher.double(), expected, rtol=2e-3, atol=1e-3 * float(expected.max())
    )


def test_all_but_the_named_parameters_stay_frozen() -> None:
    model = make_model()
    name = "model.layers.0.mlp.up_proj.weight"
    trace = warm_start(model, [name], make_batches(), PROBE, make_config().train)
    assert list(trace.update) == list(trace.evidence) == [name]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == []


def test_a_diverging_warm_start_is_an_error() -> None:
    model = make_model()
    probe = ProbeConfig(steps=20, lr=1e18, fisher_batches=1)
    with pytest.raises(
        ValueError, match=r"^probe\.lr=1e\+18: warm start: the loss is nan at step .* lower probe\.lr"
    ):
        warm_start(model, maskable(model, "all"), make_batches(), probe, make_config().train)
