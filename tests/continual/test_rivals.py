"""The methods that ours are compared with: each learns, goes on where it was cut, leaves nothing of a race, and is reported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from continual.cuts import NUM_TEST, RATES, STEPS, cut, finished, one_method
from continual.small import TASKS
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from trace_dist.config import RaceConfig, RunConfig
from trace_dist.continual.driver import check_methods
from trace_dist.continual.race import held_race, split
from trace_dist.continual.setting import Setting
from trace_dist.data.batches import Batches
from trace_dist.models.loading import load_model
from trace_dist.report.results import parse_results
from trace_dist.report.tables import summary_table
from trace_dist.stages.report import collect_results
from trace_dist.utils.finite import NotFinite

OTHER = {"ewc": {"examples": 8}}


def rival(folder: Path, name: str, run: str, **options: Any) -> RunConfig:
    """A run of one method at its rate."""
    given = {"lr": {**RATES, "lora": 2e-2}.get(name, 1e-2), **OTHER.get(name, {}), **options}
    return one_method(folder, name, run, given)


@pytest.fixture(scope="module")
def uncut(folder: Path) -> Callable[[str], dict[str, Any]]:
    """The result of a method that nobody interrupted."""
    known: dict[str, dict[str, Any]] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = finished(rival(folder, name, f"rival-{name}"))
        return known[name]

    return get


@pytest.fixture
def method(folder: Path, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes a method of a run of its own."""

    numbers = count()

    def make(name: str, **options: Any) -> Any:
        test = request.node.name.replace("[", "-").rstrip("]")
        cfg = rival(folder, name, f"alone-{test}-{next(numbers)}", **options)
        (entry,) = check_methods(cfg)
        return entry.kind(name, Setting.load(cfg), entry.options)

    return make


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) for name, value in left.items()
    )


@pytest.mark.parametrize("name", RATES)
def test_it_learns_and_is_reported(folder: Path, uncut: Callable[..., Any], name: str) -> None:
    found = uncut(name)
    first, second = found["losses"].values()
    assert first[-1][1] < 0.85 * first[0][1]
    assert (len(first), len(second)) == (STEPS, 2 * STEPS if name == "joint" else STEPS)
    cfg = rival(folder, name, f"rival-{name}")
    results = collect_results(cfg)
    (view,) = parse_results(results).methods
    assert (view.name, view.label) == (name, check_methods(cfg)[0].kind.label)
    assert len(summary_table(results).rows) == 1


@pytest.mark.parametrize("name", RATES)
def test_killed_twice_it_ends_as_the_uncut_one(
    folder: Path, uncut: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any checkpoint; and when the second task is trained, of which a checkpoint and nothing else was kept."""
    cfg = rival(folder, name, f"cut-{name}")
    for owner, function in ((Batches, "__next__"), (check_methods(cfg)[0].kind, "score")):
        cut(cfg, monkeypatch, owner, function, 2)
    assert finished(cfg) == uncut(name)


@pytest.mark.parametrize("name", sorted({*RATES} - {"ella", "ps", "shira_random"}))  # as ewc and lora do
def test_nothing_of_a_trial_is_left(method: Callable[..., Any], name: str) -> None:
    """In the middle of a stream, too, where adapters lie in the weights; and after one that diverges."""
    made = method(name)
    first, second = made.setting.bench.tasks
    made.learn(first)
    before, weights = copies(made.kept()), copies(made.module.state_dict())
    part, _ = split(second, RaceConfig(steps=3, heldout=20), 0)
    with made.trial(second, part, 1e-2) as learner:
        assert not equal(copies(learner.module.state_dict()), weights)
    assert equal(copies(made.kept()), before)
    with pytest.raises(NotFinite), made.trial(second, part, 1e30):
        pass
    assert equal(copies(made.kept()), before)
    if name != "separate":  # its next task begins from the base
        assert equal(copies(made.module.state_dict()), weights)


@pytest.mark.parametrize("name", ["ewc", "osft", "joint"])
def test_it_races(method: Callable[..., Any], name: str) -> None:
    made = method(name)
    base = copies(made.module.state_dict())
    cfg = replace(made.setting.cfg, race=RaceConfig([1e-7, 2e-2, 1e30], steps=8, heldout=20))
    setting = replace(made.setting, cfg=cfg)
    assert held_race(setting, name, setting.bench.tasks, made.trial, made.continues).lr == 2e-2
    assert equal(copies(made.module.state_dict()), base)
    assert made.memory == {}


@pytest.mark.parametrize("name", ["ewc", "ella"])
def test_without_a_penalty_it_is_full_fine_tuning(folder: Path, uncut: Callable[..., Any], name: str) -> None:
    free = finished(rival(folder, name, f"free-{name}", strength=0.0))
    full = uncut("full")
    assert (free["losses"], free["R"], free["general"]) == (full["losses"], full["R"], full["general"])
    assert uncut(name)["losses"] != full["losses"]


def test_what_earlier_tasks_need_stays_where_the_penalty_is_huge(method: Callable[..., Any]) -> None:
    moved = []
    for strength in (0.0, 1e9):
        made = method("ewc", strength=strength)
        first, second = made.setting.bench.tasks
        made.learn(first)
        fisher, before = made.memory, copies(made.trained())
        made.learn(second)
        limit = torch.cat([each.flatten() for each in fisher.values()]).quantile(0.99)
        moved.append(
            sum(
                float((made.trained()[name].detach() - before[name])[f > limit].abs().sum())
                for name, f in fisher.items()
            )
        )
    assert moved[1] < 0.2 * moved[0]


def test_fisher_is_the_mean_squared_gradient_of_single_examples(method: Callable[..., Any]) -> None:
    made = method("ewc", examples=3)
    first = made.setting.bench.tasks[0]
    made.learn(first)
    module = made.module.eval()
    expected = {name: torch.zeros_like(each) for name, each in made.trained().items()}
    batches = made.setting.bench.batches([first], 1)
    for _ in range(3):
        (row,) = next(batches).micro_batches
        module.zero_grad()
        module(**row).loss.backward()
        for name, each in made.trained().items():
            expected[name] += each.grad**2 / 3
    module.zero_grad()
    for name, each in made.memory.items():
        torch.testing.assert_close(each, expected[name], rtol=1e-4, atol=1e-9)


def test_updates_are_merged_by_magnitude(method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = method("ps")
    first, second = made.setting.bench.tasks
    base = copies(made.trained())
    made.learn(first)
    start, ends = copies(made.trained()), []
    end = type(made).end

    def watched(self: Any, *args: Any) -> None:
        ends.append(copies(self.trained()))
        end(self, *args)

    monkeypatch.setattr(type(made), "end", watched)
    made.learn(second)
    for name, final in made.trained().items():
        past, new = start[name] - base[name], ends[0][name] - start[name]
        expected = base[name] + torch.where(new.abs() > past.abs(), new, past)
        torch.testing.assert_close(final.detach(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(made.memory[name], final.detach() - base[name], rtol=0, atol=1e-6)


def test_one_lora_is_merged_with_falling_weight(
    method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = method("slao")
    first, second = made.setting.bench.tasks
    made.learn(first)
    after_first = copies(made.trained())
    begun, trained = [], []
    learner, end = type(made).learner, type(made).end
    monkeypatch.setattr(
        type(made), "learner", lambda self, lr: (begun.append(copies(self.trained())), learner(self, lr))[1]
    )
    monkeypatch.setattr(
        type(made), "end", lambda self, *rest: (trained.append(copies(self.trained())), end(self, *rest))[1]
    )
    made.learn(second)
    for name, final in made.trained().items():
        old, start, own = after_first[name], begun[0][name], trained[0][name]
        if ".lora_A." in name:
            torch.testing.assert_close(start @ start.T, torch.eye(len(start)), rtol=0, atol=1e-5)
            torch.testing.assert_close(old @ start.T @ start, old, rtol=0, atol=1e-5)
            assert torch.equal(final, own)
        else:
            assert torch.equal(start, old)  # of the first task, which is merged with weight 1
            torch.testing.assert_close(final.detach(), old + (own - old) / math.sqrt(2), rtol=0, atol=1e-6)


def test_frozen_adapters_stay_in_the_answer(method: Callable[..., Any]) -> None:
    made = method("olora")
    first, second = made.setting.bench.tasks
    made.learn(first)
    ids = torch.arange(12)[None]
    answers = made.module.eval()(input_ids=ids).logits
    for change in (lambda: made.begin(second), lambda: made.restore(copies(made.kept()))):
        change()
        torch.testing.assert_close(made.module.eval()(input_ids=ids).logits, answers, rtol=0, atol=1e-4)
    assert made.facts()["adapters"] == 2
    assert [len(each) for each in made.memory.values()] == [1] * len(made.trained())


def test_each_task_draws_adapters_of_its_own(method: Callable[..., Any]) -> None:
    """From the same ones it would begin in the subspace of the task before, which it has to leave again."""
    made = method("olora", rank=2)
    first, second = made.setting.bench.tasks
    made.learn(first)
    numbers = torch.get_rng_state()
    made.begin(second)
    assert torch.equal(torch.get_rng_state(), numbers)
    cosines = []
    for name, new in made.trained().items():
        if ".lora_A." not in name:
            assert not new.any()
            continue
        (old,) = made.memory[name]
        cosines.append(torch.nn.functional.cosine_similarity(old, new.detach()).abs())
        assert float(new.detach().abs().max()) <= new.shape[1] ** -0.5
    assert float(torch.cat(cosines).mean()) < 0.3


def test_subspaces_are_kept_off_each_other(method: Callable[..., Any]) -> None:
    overlaps = []
    for strength in (0.0, 20.0):
        made = method("olora", strength=strength)
        for stream in made.setting.bench.tasks:
            made.learn(stream)
        pairs = [
            (old[0], made.trained()[name].detach()) for name, old in made.memory.items() if ".lora_A." in name
        ]
        overlaps.append(sum(float((old @ new.T).square().sum()) for old, new in pairs))
    assert overlaps[1] < 0.5 * overlaps[0]


def test_an_update_is_orthogonal_to_the_frozen_directions(method: Callable[..., Any]) -> None:
    made = method("osft", keep=0.25)
    before = copies(made.kept())
    made.learn(made.setting.bench.tasks[0])
    shapes = set()
    for name, weight in made.kept().items():
        old = before[name].double()
        u, _, v = torch.linalg.svd(old, full_matrices=False)
        count = min(old.shape) // 4
        update = weight.detach().double() - old
        size = float(update.norm())
        assert size > 1e-3
        assert float((u[:, :count].T @ update).norm()) < 1e-4 * size
        assert float((update @ v[:count].T).norm()) < 1e-4 * size
        shapes.add((old.shape[0] > old.shape[1]) - (old.shape[0] < old.shape[1]))
    assert shapes == {-1, 0, 1}


def test_random_masks_of_one_shape_differ(method: Callable[..., Any]) -> None:
    made = method("shira_random", rank=2)
    layers = [each for each in made.layers().values() if each.out_features == each.in_features]
    places = {tuple(map(tuple, each.shira_indices["default"].tolist())) for each in layers}
    assert len(places) == len(layers) > 2
    sizes = [2 * (each.in_features + each.out_features) for each in made.layers().values()]
    assert made.facts()["trainable"] == sum(sizes)
    with pytest.raises(
        ValueError, match=r"continual.options.shira_random.rank=99: must be at most \d+ for this model"
    ):
        _ = method("shira_random", rank=99).module


@pytest.mark.parametrize("name", ["osft", "shira_random"])
def test_a_gate_of_one_output_stays_as_it_is(method: Callable[..., Any], name: str) -> None:
    """No subspace and no LoRA of rank 1 is as small; every other linear layer is trained."""
    config = Qwen2MoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, intermediate_size=32, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, num_attention_heads=2, num_key_value_heads=2, num_experts=2,
        num_experts_per_tok=1, decoder_sparse_step=1,
    )  # fmt: skip
    base = Qwen2MoeForCausalLM(config)
    linear = {each for each, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    made = method(name)
    made._module = made.prepare(base)
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert gate in linear
    assert set(made.layers()) == linear - {gate, "lm_head"}


@pytest.mark.parametrize("name", ["osft", "olora"])
def test_what_is_merged_into_a_weight_that_two_layers_share(method: Callable[..., Any], name: str) -> None:
    made = method(name)
    base = load_model(made.setting.base)
    first, second = (layer.mlp for layer in base.model.layers[:2])
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp.up_proj.weight and .*layers\.1\..* are one weight, into which"
    ):
        made.prepare(base)


def test_frozen_directions_are_one_at_least(method: Callable[..., Any]) -> None:
    rule = r"continual.options.osft.keep=0.01: keeps no direction of the narrowest layer, which has 32; use at least 0.032"
    with pytest.raises(ValueError, match=rule):
        _ = method("osft", keep=0.01).module
    assert method("osft", keep=0.032).trained()


def test_one_lora_cannot_span_more_than_its_inputs(method: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"continual.options.slao.rank=33: must be at most 32"):
        _ = method("slao", rank=33).module


def test_joint_training_draws_each_task_as_often_as_it_has_steps(method: Callable[..., Any]) -> None:
    made = method("joint")
    bench = made.setting.bench
    bench.tasks[:] = [
        replace(stream, steps=steps) for stream, steps in zip(bench.tasks, (30, 10), strict=True)
    ]
    first, second = bench.tasks
    assert [made.steps(stream) for stream in bench.tasks] == [30, 40]
    drawn = Counter(source for source, _ in map(made.batches(second)._slot, range(2000)))
    assert drawn[1] / 2000 == pytest.approx(0.75, abs=0.03)
    assert {source for source, _ in map(made.batches(first)._slot, range(200))} == {0}


def test_the_bounds_forget_nothing(uncut: Callable[..., Any]) -> None:
    full = uncut("full")
    separate, joint = uncut("separate"), uncut("joint")
    # the first task's model is that of full fine-tuning, and the base answers what belongs to no task
    assert separate["R"][1][0] == full["R"][1][0] == separate["R"][2][0]
    assert separate["general"][0] == separate["general"][-1]
    assert separate["forgetting"] == 0
    assert joint["R"][1] == full["R"][1]
    assert joint["R"][2][0] > full["R"][2][0] + 10


def test_adapters_are_retrieved(uncut: Callable[..., Any]) -> None:
    """They have the size of LoRA's; the second task does not begin with the first one's."""
    found, lora = uncut("lora_retrieved"), uncut("lora")
    assert (found["trainable"], found["losses"]["one"]) == (lora["trainable"], lora["losses"]["one"])
    assert found["losses"]["two"][0] != lora["losses"]["two"][0]
    assert found["retrieval"]["columns"] == ["base", *TASKS]
    assert [sum(row) for row in found["retrieval"]["confusion"]] == [NUM_TEST, NUM_TEST]
    assert found["retrieval"]["accuracy"] > 90


def test_adapters_do_not_change(method: Callable[..., Any]) -> None:
    """Between calls the model is the base; a task's are what its training left."""
    made = method("lora_retrieved")
    first, second = made.setting.bench.tasks
    base = copies(made.module.state_dict())
    made.learn(first)
    kept = copies(made.bank.values["one"])
    made.learn(second)
    assert equal(copies(made.module.state_dict()), base)
    with made.bank.activated(made.bank, "one"):
        assert equal(copies(made.trained()), kept)
    assert equal(copies(made.module.state_dict()), base)
    assert not equal(kept, made.bank.values["two"])
    made.score()
    assert set(made._scored.examples) == {"base", *TASKS}


@pytest.mark.parametrize("name", ["full", "lora", "ewc", "slao"])
def test_a_share_of_each_batch_is_replayed(method: Callable[..., Any], name: str) -> None:
    made = method(name, replay=0.3, replay_memory=0.1)
    bench = made.setting.bench
    batches = made.batches(bench.tasks[1])
    drawn = Counter(source for source, _ in map(batches._slot, range(2000)))
    assert drawn[0] / 2000 == pytest.approx(0.7, abs=0.03)
    # the general set and the first task, from a tenth of their examples
    assert [len(each) for each in batches._datasets[1:]] == [
        round(0.1 * len(stream.encoded)) for stream in (bench.general[0], bench.tasks[0])
    ]
    plain = method(name).batches(bench.tasks[1])
    assert {source for source, _ in map(plain._slot, range(200))} == {0}
