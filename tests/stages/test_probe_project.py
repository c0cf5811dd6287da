"""The stages probe and project on a real run folder, in this process."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from cli.program import make_config, write_config, write_tasks

from trace_dist.cli.parser import parse, run_config
from trace_dist.config import MaskConfig, ModelConfig, ProbeConfig, ProjectionConfig, PruneConfig, RunConfig
from trace_dist.continual.progress import digest_of
from trace_dist.data.tasks import load_task
from trace_dist.masks import Mask
from trace_dist.masks.ops import overlap
from trace_dist.masks.storage import load_saliency
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.origin import Origin
from trace_dist.probe.task import Probed
from trace_dist.stages import probe as stages
from trace_dist.stages.probe import Proxy, run_probe
from trace_dist.stages.project import run_project
from trace_dist.utils.files import load_tensors

TASKS = ("copy", "twist")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose proxy has been probed."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        write_tasks(folder)
        path = write_config(folder, make_config(folder))
        cfg = run_config(parse(["probe", "--config", str(path)])["probe"])
        run_probe(cfg)
    return cfg


def masks(cfg: RunConfig, kind: str = "projected") -> list[Mask]:
    return [Mask.load(cfg.folder.mask(task, kind)) for task in TASKS]


def test_the_probe_leaves_saliency_masks_and_specificity(cfg: RunConfig) -> None:
    found = json.loads(cfg.folder.specificity.read_text())
    assert found["tasks"] == list(TASKS)
    assert all(0 <= value <= 1 for value in found["specificity"])
    assert found["specificity"][0] == pytest.approx(1 - abs(found["cosine"][0][1]))
    for task in TASKS:
        scores, layouts, meta = load_saliency(cfg.folder.saliency(task))
        mask = Mask.load(cfg.folder.proxy_mask(task))
        assert dict(mask.layouts) == layouts
        assert meta["task"] == mask.meta["task"] == task
        assert cfg.proxy is not None
        assert meta["model"] == mask.meta["model"] == fingerprint(cfg.proxy.path)
        for name, units in mask.units.items():
            outside = scores[name].clone()
            outside[units.long()] = -1
            assert scores[name][units.long()].min() >= outside.max()


def test_what_the_proxy_has_learned_is_said(
    cfg: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two steps teach it nothing: a warning, or an error before the next task is probed."""
    found = json.loads(cfg.folder.specificity.read_text())["learning"]
    assert found.keys() == set(TASKS)
    for each in found.values():
        assert each["examples"] > 0
        assert each["after"] != each["before"]
    own = replace(cfg, run_dir=str(tmp_path), tasks=cfg.tasks[:1])
    with caplog.at_level("WARNING"):
        run_probe(own)
    assert "probe.margin=0.1: the probe has not learned 'copy' (loss" in caplog.text
    # A loss of its own is what a margin is above or below; the trace is kept, whatever the margin.
    made = own.folder.trace("copy").stat().st_mtime_ns
    refusing = replace(own, probe=replace(own.probe, margin=0.99, unlearned="refuse"))
    with pytest.raises(
        ValueError, match=r"probe.margin=0.99: .* chance .*raise probe.steps.*probe.unlearned: warn"
    ):
        run_probe(refusing)
    assert own.folder.trace("copy").stat().st_mtime_ns == made


def test_examples_that_judge_are_not_trained_on(cfg: RunConfig) -> None:
    """Those that the steps do not read; where they read all, some are held out."""
    proxy = Proxy.load(cfg)
    (stream, *_), size = proxy.bench.tasks, cfg.probe.batch_size
    few, many = 1, 2 * len(stream.encoded) // size
    same, heldout = proxy._apart(stream, few)
    assert same is stream
    read = proxy.bench.batches([stream], size).rows_ahead(few)
    seen = {tuple(stream.encoded[row]["input_ids"]) for row in read}
    assert heldout.examples == min(200, len(stream.encoded) // 5)
    assert not seen & tuples(heldout.step)
    less, held = proxy._apart(stream, many)
    assert len(less.encoded) + held.examples == len(stream.encoded)


def tuples(step: Any) -> set[tuple[int, ...]]:
    """The examples of a batch, without padding."""
    return {
        tuple(row[mask.bool()].tolist())
        for batch in step.micro_batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }


def test_a_piece_of_the_target_is_probed_and_its_entries_are_taken_over(
    cfg: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From cutting and healing on; a copy of whole layers of an earlier release says nothing and is known all the same."""
    assert cfg.target.tiny is not None
    narrow = PruneConfig(keep_hidden=cfg.target.tiny.hidden_size // 2, heal_steps=1)
    for prune in (narrow, PruneConfig(keep_layers=1)):
        folder = tmp_path / f"{prune.keep_layers}"
        changed = replace(
            cfg,
            run_dir=str(folder / "run"),
            proxy=ModelConfig(str(folder / "proxy"), prune=prune),
            projection=ProjectionConfig("identity"),
            tasks=cfg.tasks[:1],
        )
        run_probe(changed)
        origin = Origin.load(folder / "proxy")
        assert origin is not None
        assert (origin.hidden is None) == (prune is not narrow)
        with caplog.at_level("INFO"):
            run_project(changed)
        mask = Mask.load(changed.folder.mask("copy"))
        assert abs(mask.num_entries - cfg.mask.density * mask.num_maskable) < 1
        assert mask.meta["matching"]["position"]["entries"] > 0
        assert "by position" in caplog.text
    (folder / "proxy" / "pruned.json").unlink()
    changed.folder.mask("copy").unlink()
    run_project(changed)
    assert Mask.load(changed.folder.mask("copy")) == mask
    Origin("another", origin.stack, origin.layers).save(folder / "proxy")
    changed.folder.mask("copy").unlink()
    with pytest.raises(ValueError, match=r"proxy.path=.* cut out of another model than target.path"):
        run_project(changed)


def test_a_proxy_that_is_no_piece_of_the_target_is_refused(cfg: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"projection.placement='identity': the proxy does not say"):
        run_project(replace(cfg, projection=ProjectionConfig("identity")))


def test_a_probe_that_was_cut_measures_the_rest_alone(cfg: RunConfig) -> None:
    folder = cfg.folder
    whole = {path: path.read_bytes() for path in (folder.root / "probe").rglob("*") if path.is_file()}
    kept = folder.trace("copy").stat().st_mtime_ns
    for path in whole:
        if path not in (folder.trace("copy"), folder.sketch("copy")):
            path.unlink()
    run_probe(cfg)
    assert folder.trace("copy").stat().st_mtime_ns == kept
    # A sum over values that were read from a file may be rounded otherwise than one over those that were just made.
    cosines = folder.specificity
    found = {path: path.read_bytes() for path in whole}
    new, old = json.loads(found.pop(cosines)), json.loads(whole.pop(cosines))
    assert found == whole
    for key in ("cosine", "specificity"):
        assert np.allclose(new.pop(key), old.pop(key), rtol=1e-12, atol=0), key
    assert new == old


def test_scores_of_one_task_are_held_at_a_time(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three tasks; a general set is probed where the score compares with it."""
    held, most = list[weakref.ref](), [0]
    probed = stages.probe_task

    def counted(*arguments: Any) -> Probed:
        gc.collect()
        most[0] = max(most[0], sum(each() is not None for each in held))
        found = probed(*arguments)
        held.append(weakref.ref(next(iter(found.scores.values()))))
        return found

    monkeypatch.setattr(stages, "probe_task", counted)
    specific = replace(cfg, run_dir=str(tmp_path), probe=replace(cfg.probe, score="specific"))
    run_probe(specific)
    assert len(held) == 3
    assert most == [1]
    assert specific.folder.trace("plain").is_file()
    assert json.loads(specific.folder.specificity.read_text())["tasks"] == list(TASKS)
    # By hand, from the three traces.
    traces = {name: load_tensors(specific.folder.trace(name), "trace")[0] for name in (*TASKS, "plain")}
    means = {name: float(torch.cat([*each.values()]).double().mean()) for name, each in traces.items()}
    scores, _, _ = load_saliency(specific.folder.saliency("copy"))
    for name, score in scores.items():
        own, twist, plain = (traces[task][name].double() / means[task] for task in ("copy", "twist", "plain"))
        torch.testing.assert_close(score.double(), own / (1 + (twist + plain) / 2), rtol=1e-5, atol=1e-9)


def test_epochs_and_batches_of_the_gradients(cfg: RunConfig, tmp_path: Path) -> None:
    """A pass and a half over the training examples, 8 at a time; squared gradients of single examples are larger."""
    other = ProbeConfig(epochs=1.5, batch_size=8, fisher_batches=20, fisher_batch_size=1, score="fisher")
    changed = replace(cfg, run_dir=str(tmp_path), probe=other, tasks=cfg.tasks[:1])
    run_probe(changed)
    (curve,) = json.loads(changed.folder.specificity.read_text())["losses"].values()
    proxy = Proxy.load(changed)
    (stream,) = proxy.bench.tasks
    assert len(curve) == ceil(1.5 * len(stream.encoded) / 8)
    single, _, _ = load_saliency(changed.folder.saliency("copy"))
    run_probe(replace(changed, probe=replace(other, fisher_batch_size=None)))
    eight, _, _ = load_saliency(changed.folder.saliency("copy"))
    sizes = [sum(float(score.double().square().sum()) for score in each.values()) for each in (single, eight)]
    assert sizes[0] > 1.5 * sizes[1]


def test_what_was_probed_in_another_way_is_probed_again(cfg: RunConfig, tmp_path: Path) -> None:
    other = replace(cfg, run_dir=str(tmp_path), probe=replace(cfg.probe, score="l2"))
    other.folder.trace("copy").parent.mkdir(parents=True)
    other.folder.sketch("copy").parent.mkdir(parents=True)
    other.folder.trace("copy").write_bytes(cfg.folder.trace("copy").read_bytes())
    other.folder.sketch("copy").write_bytes(cfg.folder.sketch("copy").read_bytes())
    run_probe(other)
    assert Mask.load(other.folder.proxy_mask("copy")) != Mask.load(cfg.folder.proxy_mask("copy"))


@pytest.mark.parametrize("placement", ["magnitude", "random", "refine", "narrow"])
def test_placements(placement: str, cfg: RunConfig) -> None:
    run_project(
        replace(
            cfg,
            projection=ProjectionConfig(placement, cfg.projection.options if placement == "narrow" else {}),
        )
    )
    for kind in ("projected", "random"):
        first, second = masks(cfg, kind)
        assert first != second
        for mask, task in zip((first, second), TASKS, strict=True):
            assert abs(mask.num_entries - cfg.mask.density * mask.num_maskable) < 1
            assert mask.meta["task"] == task
            assert mask.meta["model"] == fingerprint(cfg.target.path)
    assert masks(cfg)[0].meta["method"] == f"projected/{placement}"
    assert masks(cfg, "random")[0].meta["method"] == "random"


def test_whole_tensors_are_carried_over_and_the_placement_is_not_used(cfg: RunConfig, tmp_path: Path) -> None:
    """The target is twice as wide as the proxy and has as many layers: a tensor has the score of the one of its name."""
    whole = MaskConfig(density=0.3, granularity="tensor", share_of="tensors")
    changed = replace(cfg, run_dir=str(tmp_path), mask=whole)
    run_probe(changed)
    run_project(changed)
    for task, mask in zip(TASKS, masks(changed), strict=True):
        scores, layouts, _ = load_saliency(changed.folder.saliency(task))
        best = sorted(scores, key=lambda name: -float(scores[name]))[: round(0.3 * len(scores))]
        assert sorted(mask) == sorted(best)
        assert sorted(Mask.load(changed.folder.proxy_mask(task))) == sorted(best)
        assert mask.meta["method"] == "transferred"
        assert all(mask.layouts[name] != layouts[name] for name in best)
        assert len(Mask.load(changed.folder.mask(task, "random"))) == len(best)
    made = changed.folder.mask("copy").stat().st_mtime_ns
    run_project(changed)
    assert changed.folder.mask("copy").stat().st_mtime_ns == made


def test_without_a_probe_the_target_is_asked_itself(cfg: RunConfig, tmp_path: Path) -> None:
    alone = replace(cfg, run_dir=str(tmp_path), proxy=None, projection=ProjectionConfig("target"))
    run_project(alone)
    first, second = masks(alone)
    assert first != second
    assert first.meta["method"] == "projected/target"
    assert abs(first.num_entries - cfg.mask.density * first.num_maskable) < 1
    assert not (alone.folder.root / "probe").exists()


def test_random_places_of_two_tasks_are_independent(cfg: RunConfig) -> None:
    """One seed for both would give the second task the places of the first."""
    run_project(replace(cfg, projection=ProjectionConfig("random")))
    first, second = masks(cfg)
    assert overlap(first, second) < 0.15
    assert overlap(first, masks(cfg, "random")[0]) < 0.15


def test_without_a_proxy_the_target_keeps_its_own_masks(cfg: RunConfig, tmp_path: Path) -> None:
    alone = replace(cfg, proxy=None, run_dir=str(tmp_path))
    run_probe(alone)
    run_project(alone)
    made = {"method": "probed", "density": cfg.mask.density, "model": fingerprint(cfg.target.path)}
    for task, mask in zip(alone.tasks, masks(alone), strict=True):
        assert mask == Mask.load(alone.folder.proxy_mask(task.name))
        assert mask.meta == {"task": task.name, "examples": digest_of([load_task(task, cfg.seed)]), **made}


def test_projecting_before_probing_is_one_line(cfg: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"copy\.safetensors: is not there yet; start `trace-dist probe` first"
    ):
        run_project(replace(cfg, run_dir=str(tmp_path)))


def test_specificity_moves_budgets(cfg: RunConfig, tmp_path: Path) -> None:
    """With an exponent, tensors in which the tasks agree give entries to those in which they differ."""
    weighted = replace(cfg, run_dir=str(tmp_path), probe=ProbeConfig(steps=2, batch_size=8, fisher_batches=1,
                                                                     specificity_weight=4.0))  # fmt: skip
    run_probe(weighted)
    plain, moved = (Mask.load(each.folder.proxy_mask("copy")) for each in (cfg, weighted))
    assert plain.num_entries == moved.num_entries
    assert plain != moved


def test_a_task_that_is_another_one_again_keeps_its_scores() -> None:
    """Its specificity is 0 in every tensor; zeros alone would choose the first entries of the model."""
    scores = {"a": torch.tensor([0.1, 0.4]), "b": torch.tensor([0.3, 0.2])}
    probe = SimpleNamespace(specificity_weight=2.0)
    proxy: Any = SimpleNamespace(
        cfg=SimpleNamespace(probe=probe), kept=lambda task: SimpleNamespace(scores=scores)
    )
    found = stages._scores(proxy, "again", None, {"a": 0.0, "b": 2e-16})
    assert all(torch.equal(found[name], values) for name, values in scores.items())
    weighed = stages._scores(proxy, "other", None, {"a": 0.0, "b": 0.5})
    assert torch.equal(weighed["b"], 0.25 * scores["b"])
    assert not weighed["a"].any()
