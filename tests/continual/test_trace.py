"""TRACE's own recipe on a small run, against the recipe by hand: updates and gradients of a warm start of the proxy alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from continual.small import TASKS, result

from trace_dist.bank.bank import DeltaBank
from trace_dist.config import ContinualConfig, RunConfig
from trace_dist.continual.driver import run_continual
from trace_dist.continual.methods.trace import METHOD, Options
from trace_dist.continual.setting import Setting
from trace_dist.masks import Mask
from trace_dist.models.loading import load_model
from trace_dist.models.roles import describe, full_shape
from trace_dist.probe.importance import Trace
from trace_dist.probe.warm_start import warm_start
from trace_dist.stages.report import collect_results
from trace_dist.train.workbench import Workbench


def with_trace(cfg: RunConfig, **options: Any) -> RunConfig:
    return replace(cfg, continual=ContinualConfig(["trace"], {"trace": options}))


@pytest.fixture(scope="module")
def traces(folder: Any) -> dict[str, Trace]:
    """What the proxy shows of each task, measured again."""
    from continual.small import make_config

    cfg = make_config(folder, ["retrieved"], "probed")
    assert cfg.proxy is not None
    bench = Workbench.load(cfg, cfg.proxy.path)
    found = {}
    for stream in bench.tasks:
        proxy = load_model(cfg.proxy.path, torch.float32)
        names = [name for name, _ in proxy.named_parameters()]
        batches = bench.batches([stream], cfg.probe.batch_size)
        found[stream.task.name] = warm_start(proxy, names, batches, cfg.probe, cfg.train)
    return found


def by_importance(traces: dict[str, Trace], task: str) -> dict[str, float]:
    evidence = traces[task].evidence
    parts = [
        {name: float(each.update.double().square().mean().sqrt()) for name, each in evidence.items()},
        {name: float(each.fisher.double().mean()) for name, each in evidence.items()},
    ]
    scores = dict.fromkeys(evidence, 0.0)
    for part in parts:
        least, most = min(part.values()), max(part.values())
        for name, value in part.items():
            scores[name] += 0.5 * (value - least) / (most - least)
    return scores


def by_specificity(traces: dict[str, Trace], task: str) -> dict[str, float]:
    """There is one other task."""
    (other,) = (trace.update for name, trace in traces.items() if name != task)
    own = traces[task].update
    return {
        n: -float(torch.cosine_similarity(own[n].double().flatten(), other[n].double().flatten(), 0))
        for n in own
    }


def expected_tensors(cfg: RunConfig, scores: dict[str, float], share: float) -> list[str]:
    """The target's best tensors by count; both models have two layers, so it has the mean score of its role in its layer."""
    assert cfg.proxy is not None
    infos = [describe(load_model(path, torch.float32)) for path in (cfg.proxy.path, cfg.target.path)]
    places = [
        {name: (info.role, info.layer, len(info.shape)) for name, info in each.items()} for each in infos
    ]
    means = {}
    for place in set(places[0].values()):
        there = [name for name, other in places[0].items() if other == place]
        sizes = [torch.Size(infos[0][name].shape).numel() for name in there]
        means[place] = sum(scores[n] * size for n, size in zip(there, sizes, strict=True)) / sum(sizes)
    ranked = sorted(places[1], key=lambda name: -means[places[1][name]])
    return ranked[: int(share * len(ranked) + 0.5)]


def chosen(cfg: RunConfig) -> list[Mask]:
    """The tasks' masks, without any training."""
    setting = Setting.load(cfg)
    method = METHOD("trace", setting, Options(**cfg.continual.options["trace"]))
    return [method.mask(stream) for stream in setting.bench.tasks]


def test_the_run_trains_the_tensors_of_the_recipe(fresh: RunConfig, traces: dict[str, Trace]) -> None:
    cfg = with_trace(fresh)
    run_continual(cfg)
    target = load_model(cfg.target.path, torch.float32)
    shapes = {name: full_shape(weight) for name, weight in target.named_parameters()}
    bank = DeltaBank(cfg.bank_of("trace").root)
    for task in TASKS:
        mask = Mask.load(cfg.folder.mask(task, "trace"))
        expected = expected_tensors(cfg, by_importance(traces, task), 0.1)
        assert sorted(mask) == sorted(expected)
        assert mask.granularity == "tensor"
        assert mask.num_entries == sum(torch.Size(shapes[name]).numel() for name in expected)
        delta = bank.delta(task)
        assert delta is not None
        assert delta.mask == mask
        for name, values in delta.values.items():
            assert not torch.equal(values.view(shapes[name]), target.get_parameter(name))
    found = result(cfg, "trace")
    assert found["label"] == "TRACE"
    assert len(found["R"]) == 1 + len(TASKS)
    assert "retrieval" in found
    assert collect_results(cfg)["overlap"]["trace"]["tasks"] == list(TASKS)


def test_specific_tensors_have_the_lowest_cosines(fresh: RunConfig, traces: dict[str, Trace]) -> None:
    cfg = with_trace(fresh, share=0.3, select="specificity")
    for mask, task in zip(chosen(cfg), TASKS, strict=True):
        assert sorted(mask) == sorted(expected_tensors(cfg, by_specificity(traces, task), 0.3))


def test_masks_are_made_again_for_another_share_alone(fresh: RunConfig) -> None:
    first, _ = chosen(with_trace(fresh, share=0.2))
    written = fresh.folder.mask(TASKS[0], "trace").stat().st_mtime_ns
    assert chosen(with_trace(fresh, share=0.2))[0] == first
    assert fresh.folder.mask(TASKS[0], "trace").stat().st_mtime_ns == written
    more, _ = chosen(with_trace(fresh, share=0.4))
    assert len(more) == 2 * len(first)
    assert set(first) < set(more)


def test_exclusive_tensors_go_to_the_first_task(fresh: RunConfig) -> None:
    exclusive = replace(fresh, mask=replace(fresh.mask, isolation="exclusive"))
    first, second = (set(mask) for mask in chosen(with_trace(exclusive, share=0.4)))
    assert len(first) == len(second)
    assert not first & second
    with pytest.raises(
        ValueError, match=r"task 'two' needs \d+ tensors, and of \d+ earlier tasks have left \d+; "
    ):
        chosen(with_trace(exclusive, share=0.6))


def test_before_the_probe_it_is_said(fresh: RunConfig) -> None:
    fresh.folder.trace(TASKS[0]).unlink()
    with pytest.raises(ValueError, match="is not there yet; start `trace-dist probe` first"):
        chosen(with_trace(fresh))
