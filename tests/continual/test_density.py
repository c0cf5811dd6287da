"""``mask.density: auto``: the smallest density that learns as well as the best, each at a rate of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from continual.small import TASKS, result

from trace_dist.config import ContinualConfig, ProjectionConfig, RaceConfig, RunConfig
from trace_dist.continual import density as densities
from trace_dist.continual.density import DensityRace, moved, with_density
from trace_dist.continual.driver import run_continual
from trace_dist.continual.masks import is_projected
from trace_dist.continual.race import Race
from trace_dist.continual.setting import Setting
from trace_dist.masks import Mask
from trace_dist.report.narrative import chosen_density
from trace_dist.report.results import parse_results
from trace_dist.stages.learn import _take_mask
from trace_dist.stages.preview import preview
from trace_dist.stages.project import run_project
from trace_dist.stages.report import collect_results
from trace_dist.train.workbench import Stream

GRID = [3e-3, 1e-2]
DENSITIES = [0.003, 0.3]


def racing(cfg: RunConfig, margin: float = 0.05, **changes: Any) -> RunConfig:
    race = RaceConfig(GRID, tasks=1, steps=6, heldout=20, densities=DENSITIES, density_margin=margin)
    values = {"mask": replace(cfg.mask, density="auto"), "train": replace(cfg.train, lr="auto"), "race": race}
    return replace(cfg, **{**values, "continual": ContinualConfig(["retrieved"]), **changes})


def of(**losses: float) -> DensityRace:
    """Densities with a loss each, as ``d1e_3=0.5``."""
    races = {
        float(name[1:].replace("_", "-")): Race({1e-3: loss + 1, 1e-2: loss}) for name, loss in losses.items()
    }
    return DensityRace(races, 0.05)


def test_the_smallest_density_within_the_margin_wins() -> None:
    assert of(d1e_3=0.50, d1e_2=0.40, d1e_1=0.36).density == 1e-2
    assert of(d1e_3=0.41, d1e_2=0.40, d1e_1=0.36).density == 1e-3
    # The largest need not be the best.
    assert of(d1e_3=0.50, d1e_2=0.30, d1e_1=0.60).density == 1e-2
    found = of(d1e_3=float("inf"), d1e_2=0.30, d1e_1=0.60)
    assert found.density == 1e-2
    assert found.lr == 1e-2
    assert found.to_json()["tried"][1]["loss"] == 0.30
    again = DensityRace.from_json(json.loads(json.dumps(of(d1e_3=0.50, d1e_1=0.36).to_json())))
    assert again == of(d1e_3=0.50, d1e_1=0.36)


def test_densities_are_compared_by_their_least_losses() -> None:
    """A rate that wins because it is the lowest of those that are level loses up to 5 %, as much as the margin here."""
    level = Race({1e-3: 1.04, 1e-2: 1.0}, start=3.0)
    assert level.lr == 1e-3
    found = DensityRace({1e-3: level, 1e-2: Race({1e-3: 2.0, 1e-2: 0.97}, start=3.0)}, 0.05)
    assert found.density == 1e-3
    assert [each["loss"] for each in found.to_json()["tried"]] == [1.0, 0.97]
    assert [each["lr"] for each in found.to_json()["tried"]] == [1e-3, 1e-2]


def test_a_grid_is_moved_and_keeps_its_spacing() -> None:
    assert moved([1e-3, 3e-3, 1e-2], 9e-2) == [0.03, 0.09, 0.3]
    assert moved([1e-2, 1e-3], 1e-4) == [1e-5, 1e-4]


def test_the_race_settles_masks_and_rates_and_leaves_nothing(
    fresh: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = racing(fresh)
    for task in TASKS:
        path = cfg.folder.proxy_mask(task)
        Mask.load(path).with_meta(raced=True).save(path)  # as the probe leaves it
    setting = Setting.load(cfg)
    before, state = weights(setting), torch.get_rng_state()
    trained: list[tuple[float, float]] = []
    real = densities.try_rate

    @contextmanager
    def watched(setting: Setting, mask: Mask, whole: Stream, part: Stream, lr: float, **options: Any) -> Any:
        trained.append((mask.density, lr))
        with real(setting, mask, whole, part, lr, **options) as learner:
            yield learner

    monkeypatch.setattr(densities, "try_rate", watched)
    settled = with_density(setting)
    assert all(torch.equal(value, before[name]) for name, value in weights(setting).items())
    assert torch.equal(torch.get_rng_state(), state)
    assert settled.model is setting.model
    record = json.loads(cfg.folder.density.read_text())
    assert [each["density"] for each in record["tried"]] == DENSITIES
    # From the largest on; the next one begins around its rate.
    first = [lr for density, lr in trained if density > 0.1]
    second = [lr for density, lr in trained if density < 0.1]
    assert trained == [(pytest.approx(0.3, abs=1e-3), lr) for lr in first] + [
        (pytest.approx(0.003, abs=1e-4), lr) for lr in second
    ]
    assert first[: len(GRID)] == GRID
    assert second[: len(GRID)] == moved(GRID, record["tried"][1]["lr"])
    losses = {each["density"]: each["loss"] for each in record["tried"]}
    assert settled.cfg.mask.density == min(d for d in DENSITIES if losses[d] <= min(losses.values()) + 0.05)
    # The record is read; where it was lost, the races of the densities are.
    number = len(trained)
    assert with_density(Setting.load(cfg)).cfg == settled.cfg
    cfg.folder.density.unlink()
    assert with_density(Setting.load(cfg)).grid == settled.grid
    assert len(trained) == number
    other = replace(cfg, race=replace(cfg.race, steps=7, densities=[0.3, 0.4]))
    with_density(Setting.load(other))
    assert len(trained) > number
    monkeypatch.undo()
    with_density(Setting.load(cfg))
    check_run(cfg, settled)


def test_densities_race_again_under_another_placement(
    fresh: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only where all were done: a race of one density is of the masks that were placed then."""
    cfg = racing(fresh)
    number = counted(monkeypatch)
    with_density(Setting.load(cfg))
    first = number()
    cfg.folder.density.unlink()
    carried = replace(cfg, train=replace(cfg.train, log_every=1), probe=replace(cfg.probe, margin=0.7))
    with_density(Setting.load(carried))
    assert number() == first
    with_density(Setting.load(replace(cfg, projection=ProjectionConfig("random"))))
    second = number()
    assert second >= first + len(DENSITIES) * len(GRID)
    with_density(Setting.load(replace(cfg, mask=replace(cfg.mask, granularity="row"))))
    assert number() >= second + len(DENSITIES) * len(GRID)


def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a rate was tried so far; nothing is trained."""
    tried: list[float] = []

    def try_rate(setting: Setting, mask: Any, whole: Stream, part: Stream, lr: float, **_: Any) -> Any:
        tried.append(lr)
        return nullcontext()

    monkeypatch.setattr(densities, "projected_mask", lambda *_: None)
    monkeypatch.setattr(densities, "try_rate", try_rate)
    monkeypatch.setattr("trace_dist.continual.race._loss_after", lambda *_: 1.0)
    return lambda: len(tried)


def test_masks_of_another_density_are_made_again(fresh: RunConfig) -> None:
    """As where a race with another margin has chosen one; a mask that was given is trained as it is."""
    cfg = replace(fresh, tasks=fresh.tasks[:1], projection=ProjectionConfig("random"))
    proxy = cfg.folder.proxy_mask(TASKS[0])
    Mask.load(proxy).with_meta(raced=True).save(proxy)
    dense = Setting.load(cfg)
    stream, path = dense.bench.tasks[0], cfg.folder.mask(TASKS[0])
    made = dense.mask_for(stream)
    assert made.meta["density"] == 0.3
    assert is_projected(cfg, TASKS[0], dense.fingerprint)
    sparse = cfg.at_density(0.1)
    assert not is_projected(sparse, TASKS[0], dense.fingerprint)
    assert Setting.load(sparse).mask_for(stream).density == pytest.approx(0.1, rel=0.05)
    assert is_projected(sparse, TASKS[0], dense.fingerprint)
    given = path.with_name("given.safetensors")
    made.save(given)
    _take_mask(sparse, given)
    assert Setting.load(sparse).mask_for(stream) == made


def check_run(cfg: RunConfig, settled: Setting) -> None:
    """The run has masks of that density, races for its rates from there, and says what was tried."""
    run_project(cfg)
    chosen = settled.cfg.mask.share
    assert settled.grid is not None
    for task in TASKS:
        for kind in ("projected", "random"):
            assert Mask.load(cfg.folder.mask(task, kind)).density == pytest.approx(chosen, rel=0.05)
    run_continual(cfg)
    assert {each["lr"] for each in result(cfg, "retrieved")["rates"]} >= set(settled.grid)
    text = " ".join(chosen_density(parse_results(collect_results(cfg))))
    assert f"The density {100 * chosen:g}" in text
    assert text.count(", rate ") == len(DENSITIES)


def weights(setting: Setting) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in setting.model.full_state_dict().items()}


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("train", {"lr": 3e-3}, r"train.lr=0.003: density and rate must fit each other.*set train.lr: auto"),
        ("race", {"densities": [0.1]}, r"race.densities=\[0.1\]: must hold at least two densities"),
        ("race", {"densities": [0.1, 2.0]}, r"race.densities=\[0.1, 2.0\]"),
        ("race", {"density_margin": -1.0}, r"race.density_margin=-1.0: must be at least 0"),
        ("mask", {"cap": 0.2}, r"mask.cap=0.2: must lie in \[mask.density=0.3, 1\]"),
    ],
)
def test_what_cannot_race_is_refused(
    whole: RunConfig, section: str, changes: dict[str, Any], message: str
) -> None:
    cfg = racing(whole)
    with pytest.raises(ValueError, match=message):
        replace(cfg, **{section: replace(getattr(cfg, section), **changes)})


def test_a_preview_counts_the_trainings(whole: RunConfig, tmp_path: Path) -> None:
    cfg = replace(racing(whole), run_dir=str(tmp_path))
    work = {each.name: each for each in preview(cfg).work}
    # Two densities, two rates, one task, six steps.
    assert work["race for a density"].steps == 24


def test_a_density_that_is_not_settled_is_no_number(whole: RunConfig) -> None:
    cfg = racing(whole)
    with pytest.raises(ValueError, match=r"mask.density='auto': no race has chosen one here; give a number"):
        _ = cfg.mask.share
    assert cfg.largest.mask.share == 0.3
    assert cfg.at_density(0.003).largest.mask.share == 0.003
