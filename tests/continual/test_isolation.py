"""Isolation: disjoint masks and smaller steps, beside dense references, in whole runs, and from a module of somebody's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from continual.small import STEPS, TASKS, make_config, outcome, prepare
from torch import Tensor

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.delta import Delta, extract_delta
from trace_dist.bank.overlap import shared_entries
from trace_dist.config import MaskConfig, RunConfig
from trace_dist.continual.driver import run_continual
from trace_dist.continual.earlier import check_room
from trace_dist.continual.isolation.base import Change, load_isolation
from trace_dist.continual.setting import Setting
from trace_dist.masks import Mask, UnitLayout
from trace_dist.stages.report import collect_results
from trace_dist.stages.start import check_parts
from trace_dist.train import learner

SHAPES = {"a": (7, 9), "b": (5, 11), "c": (13,)}


def random_mask(unit: int, seed: int, names: str = "abc") -> Mask:
    """A third of the units; rows where ``unit`` is 0."""
    generator = torch.Generator().manual_seed(seed)
    layouts = {name: UnitLayout(shape, min(unit or shape[-1], shape[-1])) for name, shape in SHAPES.items()}
    units = {
        name: torch.randperm(layouts[name].num_units, generator=generator)[: -(-layouts[name].num_units // 3)]
        for name in names
    }
    return Mask({name: chosen.sort().values.int() for name, chosen in units.items()}, layouts, "element")


def random_change(mask: Mask, seed: int) -> Change:
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.rand(len(mask.elements(name)), generator=generator) for name in mask}
    return Change(f"task{seed}", mask, values)


@pytest.mark.parametrize("unit", [1, 4, 0])
def test_a_unit_is_refused_when_any_of_its_entries_is_taken(unit: int) -> None:
    """Earlier tasks of other granularities, and some without any entry in a tensor."""
    earlier = [random_mask(1, 0), random_mask(0, 1, "ac"), random_mask(4, 2, "b")]
    layouts = random_mask(unit, 9).layouts
    refused = load_isolation(MaskConfig(isolation="exclusive")).refused(layouts, iter(earlier))
    for name, layout in layouts.items():
        taken = torch.stack([mask.dense(name).flatten() for mask in earlier]).any(0)
        expected = [u for u in range(layout.num_units) if taken[layout.elements(torch.tensor([u]))].any()]
        assert refused[name].tolist() == expected


@pytest.mark.parametrize("strength", [0.5, 3.0])
@pytest.mark.parametrize("unit", [1, 4])
def test_soft_factors(strength: float, unit: int) -> None:
    """1 / (1 + strength * need), with the need summed densely in float64."""
    changes = [
        random_change(random_mask(1, 0), 0),
        random_change(random_mask(4, 1, "ab"), 1),
        Change("idle", random_mask(1, 2), {name: torch.zeros(len(random_mask(1, 2).elements(name))) for name in "abc"}),
    ]  # fmt: skip
    mask = random_mask(unit, 3)
    soft = load_isolation(MaskConfig(isolation="soft", isolation_options={"strength": strength}))
    found = soft.scale(mask, iter(changes)) or {}
    for name in mask:
        need = torch.zeros(mask.layouts[name].numel, dtype=torch.float64)
        for change in changes[:2]:
            everything = torch.cat([values.double() for values in change.values.values()])
            if name in change.mask.units:
                need[change.mask.elements(name)] += change.values[name].double() / everything.mean()
        expected = 1 / (1 + strength * need[mask.elements(name)])
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=0)
    assert soft.scale(mask, []) is None
    assert soft.scale(mask, changes[2:]) is None


def test_change_is_how_far_values_moved() -> None:
    mask = random_mask(1, 0, "a")
    count = len(mask.elements("a"))
    before = Delta(mask, {"a": torch.full((count,), 2.0, dtype=torch.bfloat16)}, "t")
    after = Delta(mask, {"a": torch.full((count,), 1.5, dtype=torch.bfloat16)}, "t")
    assert Change.between(before, after).values["a"].tolist() == [0.5] * count


@pytest.mark.parametrize(
    ("mask", "tasks", "message"),
    [
        (MaskConfig(density=0.3, isolation="exclusive"), 4, "mask.isolation='exclusive': 4 tasks of mask.density=0.3 have"),
        (MaskConfig(isolation="soft", isolation_options={"strength": 0.0}), 2, "isolation_options.strength=0.0: must be"),
        (MaskConfig(isolation="soft", isolation_options={"strengh": 1.0}), 2, "'strengh' is not an option"),
        (MaskConfig(isolation="shared", isolation_options={"strength": 1.0}), 2, "it has no options"),
        (MaskConfig(isolation="no.where"), 2, "mask.isolation='no.where': cannot be imported"),
        (MaskConfig(isolation="trace_dist.masks.room"), 2, "the module has no ISOLATION"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_work(
    mask: MaskConfig, tasks: int, message: str, tmp_path: Path
) -> None:
    cfg = make_config(tmp_path, ["retrieved"], mask=mask)
    first = cfg.tasks[0]
    cfg = replace(cfg, tasks=[replace(first, name=f"t{number}") for number in range(tasks)])
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        check_parts(cfg)
    assert "\n" not in str(caught.value)


def test_an_unknown_name() -> None:
    with pytest.raises(
        ValueError,
        match=r"mask.isolation='exclusiv': there is no such part; choose among shared, exclusive, soft",
    ):
        MaskConfig(isolation="exclusiv")


def test_no_room() -> None:
    mask = random_mask(1, 0)
    with pytest.raises(
        ValueError, match=r"mask.isolation='exclusive': task 'late' needs 105 entries, and of 131 .* left 86"
    ):
        check_room(mask.layouts, 0.8, mask.units, "late", "exclusive")
    check_room(mask.layouts, 86 / 131, mask.units, "late", "exclusive")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, examples and a probed run."""
    folder = tmp_path_factory.mktemp("isolated")
    prepare(folder)
    return folder


def isolated(root: Path, run: str, methods: Sequence[str], isolation: str, **options: Any) -> RunConfig:
    """A probed run with an isolation."""
    shutil.copytree(root / "probed", root / run)
    mask = MaskConfig(density=0.3, maskable="all", isolation=isolation, isolation_options=options)
    return make_config(root, methods, run, mask=mask)


def masks_of(cfg: RunConfig, kind: str = "projected", tasks: Sequence[str] = TASKS) -> list[Mask]:
    return [Mask.load(cfg.folder.mask(task, kind)) for task in tasks]


@pytest.fixture(scope="module")
def exclusive(root: Path) -> RunConfig:
    """Learned by all masked methods."""
    cfg = isolated(root, "exclusive", ["retrieved", "random", "merged"], "exclusive")
    run_continual(cfg)
    return cfg


@pytest.mark.parametrize("kind", ["projected", "random"])
def test_exclusive_masks_are_disjoint_and_full(exclusive: RunConfig, kind: str) -> None:
    masks = masks_of(exclusive, kind)
    assert all(mask.num_entries == round(0.3 * mask.num_maskable) for mask in masks)
    assert float(shared_entries(masks)[0, 1]) == 0
    assert masks[1].meta["isolation"] == "exclusive"
    assert masks[1].meta["earlier"] == [TASKS[0]]


def test_exclusive_deltas_lie_beside_each_other(exclusive: RunConfig) -> None:
    for method in ("retrieved", "random"):
        bank = DeltaBank(exclusive.bank_of(method).root)
        assert float(shared_entries([bank.mask(task) for task in TASKS])[0, 1]) == 0


def test_every_commit_that_measured_a_method_is_reported(exclusive: RunConfig, tmp_path: Path) -> None:
    later = replace(exclusive, run_dir=str(tmp_path / "later"))
    shutil.copytree(exclusive.run_dir, later.run_dir)
    for method, commit in {"retrieved": "aaaa", "merged": "bbbb", "random": "aaaa"}.items():
        path = later.folder.methods / f"{method}.json"
        written = json.loads(path.read_text()) | {"measured": {"commit": commit, "date": commit}}
        path.write_text(json.dumps(written))
    info = collect_results(later)["run_info"]
    assert (info["commits"], info["date"]) == (["aaaa", "bbbb"], "aaaa")


def test_the_overlap_is_reported(exclusive: RunConfig) -> None:
    """Per method, the bank's tasks, or the run's where there is no bank."""
    found = collect_results(exclusive)["overlap"]
    assert found == {
        method: {"tasks": list(TASKS), "matrix": [[1.0, 0.0], [0.0, 1.0]]}
        for method in ("retrieved", "merged", "random")
    }


def test_masks_do_not_depend_on_which_was_asked_for_first(exclusive: RunConfig, root: Path) -> None:
    """The second task's mask, made in a run whose first mask is gone with its run, comes from the bank."""
    cfg = isolated(root, "later", ["retrieved"], "exclusive")
    shutil.copytree(exclusive.bank_of().root, cfg.bank_of().root)
    DeltaBank(cfg.bank_of().root).remove(TASKS[1])
    cfg = replace(cfg, tasks=cfg.tasks[1:])
    run_continual(cfg)
    assert not cfg.folder.mask(TASKS[0]).exists()
    old, new = masks_of(exclusive)[0], masks_of(cfg, tasks=TASKS[1:])[0]
    assert new == masks_of(exclusive)[1]
    assert float(shared_entries([old, new])[0, 1]) == 0
    other = isolated(root, "asked", ["retrieved"], "exclusive")
    setting = Setting.load(other)
    assert setting.mask_for(setting.bench.tasks[1]) == new


def test_a_given_mask_that_takes_what_is_refused(exclusive: RunConfig, root: Path) -> None:
    cfg = isolated(root, "given", ["retrieved"], "exclusive")
    taken = masks_of(exclusive)[0]
    for task in TASKS:
        Mask(dict(taken.units), taken.layouts, taken.granularity).save(cfg.folder.mask(task))
    setting = Setting.load(cfg)
    assert setting.mask_for(setting.bench.tasks[0]) == taken
    with pytest.raises(
        ValueError, match=r"entries are earlier tasks', which mask.isolation='exclusive' refuses"
    ):
        setting.mask_for(setting.bench.tasks[1])


def test_a_task_that_came_since_the_mask_was_made_is_seen(exclusive: RunConfig, root: Path) -> None:
    """A learning was cut after its mask was made, and another task was learned meanwhile: it may have taken the same entries."""
    cfg = isolated(root, "since", ["retrieved"], "exclusive")
    cfg = replace(cfg, tasks=cfg.tasks[1:])
    setting = Setting.load(cfg)
    (stream,) = setting.bench.tasks
    alone = setting.mask_for(stream)
    assert setting.mask_for(stream) == alone
    shutil.copytree(exclusive.bank_of().root, cfg.bank_of().root)
    DeltaBank(cfg.bank_of().root).remove(TASKS[1])
    with pytest.raises(ValueError, match=r"entries are earlier tasks', .* delete the file to have one made"):
        setting.mask_for(stream)
    cfg.folder.mask(TASKS[1]).unlink()
    assert setting.mask_for(stream) == masks_of(exclusive)[1]


def moved(cfg: RunConfig, task: str) -> tuple[Mask, dict[str, Tensor]]:
    """How far a task of a bank moved its entries."""
    setting = Setting.load(cfg)
    delta = DeltaBank(cfg.bank_of().root).delta(task)
    assert delta is not None
    base = extract_delta(setting.model, delta.mask, task)
    return delta.mask, {name: (delta.values[name] - base.values[name]).abs() for name in delta.mask}


def test_soft_moves_needed_entries_less(root: Path) -> None:
    """The masks are those of ``shared``, the first task's delta too; the second moves less where the first moved much."""
    shared = isolated(root, "shared", ["retrieved"], "shared")
    soft = isolated(root, "soft", ["retrieved"], "soft", strength=50.0)
    run_continual(shared)
    run_continual(soft)
    assert masks_of(soft) == masks_of(shared)
    far = {}
    for cfg in (shared, soft):
        mask, first = moved(cfg, TASKS[0])
        other, second = moved(cfg, TASKS[1])
        on_both = [
            second[n][torch.isin(other.elements(n), mask.elements(n))].sum() for n in other if n in mask.units
        ]
        far[cfg.mask.isolation] = (sum(float(v.sum()) for v in first.values()), float(sum(on_both)))
    assert far["soft"][0] == far["shared"][0]
    assert 0 < far["soft"][1] < 0.3 * far["shared"][1]


@pytest.mark.parametrize("method", ["retrieved", "merged"])
def test_a_cut_run_goes_on_with_the_same_factors(
    root: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in the middle of the second task: the same deltas and scores as uncut."""
    whole = isolated(root, f"whole-{method}", [method], "soft")
    cut = isolated(root, f"cut-{method}", [method], "soft")
    run_continual(whole)
    steps, step = 0, learner.MaskedLearner.step

    def failing(self: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == STEPS + 2 * 2 + STEPS // 2 + 1:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(learner.MaskedLearner, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        run_continual(cut)
    monkeypatch.undo()
    assert list(cut.folder.checkpoints(method, TASKS[1]).iterdir())
    run_continual(cut)
    assert outcome(cut, method) == outcome(whole, method)


def test_a_task_that_left_the_bank_is_missed(root: Path) -> None:
    cfg = isolated(root, "left", ["retrieved"], "soft")
    setting = Setting.load(cfg)
    setting.mask_for(setting.bench.tasks[1])
    with pytest.raises(ValueError, match=f"was made beside '{TASKS[0]}', which the bank .* no longer holds"):
        run_continual(replace(cfg, tasks=cfg.tasks[1:]))


FIRST_HALF = '''
"""Odd tasks have the first half of each tensor."""
from dataclasses import dataclass

import torch

from trace_dist.continual.isolation.base import Isolation


@dataclass(frozen=True)
class Options:
    share: float = 0.5


class Half(Isolation):
    label = "half of each tensor"

    def refused(self, layouts, earlier):
        if len(list(earlier)) % 2:
            return {n: torch.arange(int(self.options.share * layout.num_units)) for n, layout in layouts.items()}
        return {}

    def scale(self, mask, changes):
        return {name: torch.zeros(len(mask.elements(name))) for name in list(mask)[:1]}


ISOLATION = Half
'''


def test_a_module_of_ones_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file on the path: its refusal and its factors hold, its options are read."""
    (root / "dropped").mkdir()
    (root / "dropped" / "halves.py").write_text(FIRST_HALF)
    monkeypatch.syspath_prepend(root)
    cfg = isolated(root, "own", ["retrieved"], "dropped.halves", share=0.25)
    check_parts(cfg)
    run_continual(cfg)
    second = masks_of(cfg)[1]
    for name, units in second.units.items():
        assert int(units.min()) >= int(0.25 * second.layouts[name].num_units)
    _, change = moved(cfg, TASKS[1])
    still, *others = [float(change[name].sum()) for name in change]
    assert still == 0
    assert all(others)
    assert json.loads(cfg.folder.method("retrieved").read_text())["label"] == "retrieved"
    assert DeltaBank(cfg.bank_of().root).tasks == [BASE, *TASKS]
