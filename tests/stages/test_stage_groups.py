"""The stages of a run: what each needs and leaves, in which order, and on which ranks."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from trace_dist.cli.parser import parse, run_config
from trace_dist.config import (
    ContinualConfig,
    LaunchConfig,
    MaskConfig,
    ModelConfig,
    ProbeConfig,
    ProjectionConfig,
    PruneConfig,
    RunConfig,
    TaskConfig,
    TinyConfig,
    TrainConfig,
)
from trace_dist.stages import memory, project
from trace_dist.stages.pipeline import stage_groups
from trace_dist.stages.stage import ALONE, Stage
from trace_dist.stages.start import check_parts

ONE = [TaskConfig("one", "one.jsonl")]
TRACE = ContinualConfig(["trace"])
SPECIFIC = ContinualConfig(["trace"], {"trace": {"select": "specificity"}})
OF_TARGET = ProjectionConfig("narrow_target")


def make(folder: Path, **changes: object) -> RunConfig:
    values = {
        "run_dir": str(folder / "run"),
        "target": ModelConfig(str(folder / "target"), tiny=TinyConfig()),
        "proxy": ModelConfig(str(folder / "proxy"), tiny=TinyConfig()),
        "tasks": [TaskConfig("one", "one.jsonl"), TaskConfig("two", "two.jsonl")],
        "backend": "zero3",
        "launch": LaunchConfig("deepspeed", 2, single_process=["consolidated"]),
    }
    return RunConfig(**{**values, **changes})


def names(cfg: RunConfig) -> list[list[str]]:
    return [[stage.name for stage in group] for group in stage_groups(cfg)]


def test_methods_on_ranks_share_a_launch_and_the_others_run_alone(tmp_path: Path) -> None:
    cfg = make(tmp_path)
    assert names(cfg) == [
        ["base target", "probe"],
        ["probe"],
        ["project retrieved random"],
        ["memory", "consolidated", "full", "lora"],
    ]
    *_, (shared,), (states, *alone) = stage_groups(cfg)
    assert shared.launched
    assert states.launched
    assert not any(stage.launched for stage in alone)
    assert all(stage.arguments[-len(ALONE) :] == ALONE for stage in alone)


def test_a_stage_that_runs_alone_forgets_the_hosts_of_the_others(tmp_path: Path) -> None:
    """Its command line is one that the command takes."""
    launch = LaunchConfig("torchrun", num_ranks=2, hostfile=str(tmp_path / "hosts"))
    cfg = make(tmp_path, launch=launch)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(asdict(cfg)))))
    stage = stage_groups(cfg)[0][0]
    assert stage.name.startswith("base")
    command, *rest = stage.arguments
    given = run_config(parse([command, "--config", str(tmp_path / "run.yaml"), *rest])[command])
    assert given.launch == replace(launch, launcher="none", num_ranks=1, hostfile=None)


def test_without_methods_on_ranks_masks_are_projected_by_a_stage_of_its_own(tmp_path: Path) -> None:
    cfg = make(tmp_path, continual=ContinualConfig(["full"]), backend="fsdp2")
    assert names(cfg)[2:] == [["project"], ["full"]]


def test_a_proxy_that_is_cut_out_of_the_target_waits_for_it(tmp_path: Path) -> None:
    cut = ModelConfig(str(tmp_path / "proxy"), prune=PruneConfig())
    assert names(make(tmp_path, proxy=cut))[:2] == [["base target"], ["probe"]]


def test_nothing_is_probed_that_nobody_reads(tmp_path: Path) -> None:
    cfg = make(tmp_path, projection=ProjectionConfig("target"))
    assert names(cfg)[:2] == [["base target"], ["project retrieved random"]]
    assert not stage_groups(cfg)[1][0].inputs
    # TRACE's own masks come from the probe, whatever makes the others.
    cfg = replace(cfg, continual=ContinualConfig(["retrieved", "trace"]))
    assert names(cfg)[:3] == [["base target", "probe"], ["probe"], ["project retrieved trace"]]


def test_methods_with_masks_of_their_own_project_none(tmp_path: Path) -> None:
    cfg = make(tmp_path, continual=ContinualConfig(["trace"]))
    assert names(cfg)[2:] == [["trace"], ["project"], ["memory"]]


def test_a_model_from_elsewhere_is_not_made(tmp_path: Path) -> None:
    target, *_ = stage_groups(make(tmp_path, target=ModelConfig("somebody/model")))[0]
    assert target.done


def test_a_stage_is_done_when_all_its_files_are_there(tmp_path: Path) -> None:
    stage = Stage("s", [], [tmp_path / "a", tmp_path / "b"], {tmp_path / "c": "probe"})
    (tmp_path / "a").touch()
    assert not stage.done
    (tmp_path / "b").touch()
    assert stage.done
    with pytest.raises(ValueError, match="c: is not there yet; start `trace-dist probe` first"):
        stage.check_inputs()
    (tmp_path / "c").touch()
    stage.check_inputs()


def test_what_one_stage_needs_another_leaves(tmp_path: Path) -> None:
    cfg = make(tmp_path)
    left = {path for group in stage_groups(cfg) for stage in group for path in stage.outputs}
    for stage in (project.describe(cfg), memory.describe(cfg), *stage_groups(cfg)[2]):
        assert set(stage.inputs) <= left
        assert stage.inputs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": MaskConfig(density=0.2)}, "projection.options.pool_density=0.1: must be at least mask.density=0.2"),
        ({"mask": MaskConfig(density=0.3), "proxy": None, "projection": OF_TARGET}, "must be at least mask.density=0.3"),
        ({"mask": MaskConfig(density=0.3, granularity="tensor"), "projection": OF_TARGET}, "must be at least mask.density=0.3"),
        ({"projection": ProjectionConfig(options={"steps": 0})}, "projection.options.steps=0: must be at least 1"),
        ({"projection": ProjectionConfig(options={"pool_density": 1.5})}, "projection.options.pool_density=1.5: must lie in"),
        ({"projection": ProjectionConfig(options={"narrow_steps": 3})}, "'narrow_steps' is not an option"),
        ({"projection": ProjectionConfig("random", {"steps": 3})}, "'steps' is not an option; it has no options"),
        ({"continual": ContinualConfig(options={"lora": {"rang": 3}})}, "'rang' is not an option"),
        ({"continual": ContinualConfig(options={"merged": {"replay": 1.0}})}, "merged.replay=1.0: must lie in [0, 1)"),
        ({"continual": ContinualConfig(["full"], {"lora": {"rank": "x"}})}, 'key "rank"'),
        ({"train": TrainConfig(scheduler="cosin")}, "train.scheduler='cosin'"),
        ({"train": TrainConfig(scheduler="reduce_lr_on_plateau")}, "must depend on the step alone"),
        ({"probe": ProbeConfig(steps=0)}, "probe.steps=0: probe.score='l2_fisher' reads the update"),
        ({"probe": ProbeConfig(steps=0, score="fisher"), "continual": TRACE}, "probe.steps=0: continual.methods='trace'"),
        ({"probe": ProbeConfig(score="specific"), "tasks": ONE}, "probe.score='specific': compares the task with others"),
        ({"continual": SPECIFIC, "tasks": ONE}, "continual.options.trace.select='specificity': specificity compares tasks"),
        ({"continual": ContinualConfig(options={"trace": {"share": 0.0}})}, "options.trace.share=0.0: must lie in (0, 1]"),
        ({"projection": ProjectionConfig(options={"pool": "fischer"})}, "pool"),
        ({"probe": ProbeConfig(score="snr", fisher_batches=1)}, "probe.fisher_batches=1: probe.score='snr' needs at least 2"),
    ],
)  # fmt: skip
def test_options_are_checked_before_work(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_parts(make(tmp_path, **changes))


def test_without_a_proxy_the_pool_may_be_smaller_than_the_mask(tmp_path: Path) -> None:
    """Nothing is projected then."""
    check_parts(replace(make(tmp_path, mask=MaskConfig(density=0.2)), proxy=None))
