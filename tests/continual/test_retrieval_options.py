"""A run whose retrieval is chosen: kind of signature, layer, the tasks' own representations, rejection."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from continual.small import TASKS, result

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.config import BankConfig, RunConfig
from trace_dist.config.bank import Pooling
from trace_dist.continual.driver import run_continual
from trace_dist.continual.layer import bank_view
from trace_dist.continual.setting import Setting
from trace_dist.run_folder import ADAPTED

OPTIONS = BankConfig(
    clusters=2,
    num_prompts=30,
    layer="auto",
    pooling="auto",
    signature="diagonal",
    representation="adapted",
    candidates=2,
    reject=0.1,
)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_a_run_with_all_options_and_a_later_task(fresh: RunConfig) -> None:
    """The second task comes in a run of its own: it takes the layer of the bank, and changes no earlier byte."""
    cfg = replace(fresh, bank=OPTIONS, tasks=fresh.tasks[:1])
    run_continual(cfg)
    bank = DeltaBank(cfg.bank_of().root)
    view, before = (bank.layer, bank.pooling), files(bank.folder)
    assert view[0] in (0, 1, 2)
    assert view[1] in get_args(Pooling)
    assert bank.adapted(TASKS[0]).kind == bank.signature(BASE).kind == "diagonal"
    assert not bank.adapted(TASKS[0]).same(bank.signature(TASKS[0]))
    later = replace(cfg, tasks=fresh.tasks[1:], run_dir=f"{cfg.run_dir}-later")
    later = replace(later, bank=replace(OPTIONS, path=str(bank.folder)))
    for name in ("probe", "masks"):
        source = cfg.folder.root / name
        if source.is_dir():
            (later.folder.root).mkdir(exist_ok=True)
            (later.folder.root / name).symlink_to(source)
    run_continual(later)
    bank = DeltaBank(cfg.bank_of().root)
    assert ((bank.layer, bank.pooling), bank.tasks) == (view, [BASE, *TASKS])
    after = files(bank.folder)
    assert before.items() <= after.items()
    assert sum(ADAPTED in name for name in after) == 2
    found = result(later, "retrieved")["retrieval"]
    assert sum(map(sum, found["confusion"])) == len(Setting.load(later).bench.tasks[0].task.test)
    # Held-out prompts and margins under the base say nothing where the tasks' own weights decide.
    assert not {"margins", "rejection"} & found.keys()
    assert not any("bound" in key or "estimate" in key for key in found)
    assert {example["task"] for example in found["examples"]} == {TASKS[1]}


def test_the_layer_is_chosen_once_and_only_where_there_is_a_choice(fresh: RunConfig) -> None:
    cfg = replace(fresh, bank=OPTIONS)
    setting = Setting.load(cfg)
    folder = cfg.bank_of()
    chosen = bank_view(setting.judge, setting.model, folder)
    assert chosen == bank_view(setting.judge, setting.model, folder)
    other = (chosen[0] + 1) % 3, next(each for each in get_args(Pooling) if each != chosen[1])
    DeltaBank.create(folder.root, setting.fingerprint, *other)
    assert bank_view(setting.judge, setting.model, folder) == other
    alone = replace(cfg, tasks=cfg.tasks[:1], general=[], run_dir=f"{cfg.run_dir}-alone")
    for name, options in (("layer", OPTIONS), ("pooling", replace(OPTIONS, layer=0))):
        message = rf"bank\.{name}='auto': is chosen by telling sets of prompts apart"
        with pytest.raises(ValueError, match=message):
            Setting.load(replace(alone, bank=options))


def test_a_bank_of_another_pooling_is_refused(fresh: RunConfig) -> None:
    setting = Setting.load(fresh)
    DeltaBank.create(fresh.bank_of().root, setting.fingerprint, 0, "max")
    with pytest.raises(ValueError, match=r"^bank\.pooling='mean': the bank .* was made with max; set that"):
        run_continual(fresh)


def test_a_bank_of_another_kind_is_refused_before_anything_is_trained(fresh: RunConfig, folder: Path) -> None:
    setting = Setting.load(fresh)
    bank = DeltaBank.create(fresh.bank_of().root, setting.fingerprint, 0)
    bank.add(setting.judge.signature(setting.model, setting.bench.general, BASE, 0), None)
    with pytest.raises(ValueError, match=r"bank\.signature='full': compares tasks by density, but the bank"):
        run_continual(replace(fresh, bank=replace(fresh.bank, signature="full")))
