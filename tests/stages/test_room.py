"""A bank without room for a new task is found before anything is probed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from bank.samples import drawn
from cli.program import make_config, write_config, write_tasks

from trace_dist import DeltaBank, Mask, shard
from trace_dist.bank.delta import extract_delta
from trace_dist.cli.main import main
from trace_dist.cli.parser import parse, run_config
from trace_dist.config import MaskConfig, TinyConfig
from trace_dist.continual.earlier import check_room_beside
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.tiny import build_tiny
from trace_dist.models.tokenizer import char_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, a target, and a bank that holds 60 % of it."""
    root = tmp_path_factory.mktemp("room")
    write_tasks(root)
    config = make_config(root)
    target, texts = Path(config["target"]["path"]), (root / "twist.jsonl").read_text().splitlines()
    tokenizer = char_tokenizer({"all": texts}, texts)
    tokenizer.save_pretrained(target)
    build_tiny(TinyConfig(32, 2, 2, 48), len(tokenizer), seed=0).save_pretrained(target)
    model = shard(build_tiny(TinyConfig(32, 2, 2, 48), len(tokenizer), seed=0), "single")
    base = fingerprint(target)
    mask = Mask.random(model, density=0.6, granularity="row", seed=0).with_meta(task="old", model=base)
    bank = DeltaBank.create(root / "bank", base, layer=-1)
    bank.add(drawn("old", 1, dim=32), extract_delta(model, mask, "old"))
    config |= {"bank": {"path": str(root / "bank")}, "projection": {"placement": "magnitude"}}
    config |= {"mask": {"isolation": "exclusive", "granularity": "row", "density": 0.3}}
    config |= {"continual": {"methods": ["retrieved"]}}
    write_config(root, config)
    return root


@pytest.mark.parametrize("command", ["learn", "run"])
def test_nothing_is_begun_where_the_bank_has_no_room(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--config", str(folder / "config.yaml")]) == 2
    said = capsys.readouterr().err
    assert "mask.isolation='exclusive': task 'copy' and each of 1 after it needs" in said
    assert "lower mask.density to 0.2 at most" in said or "lower mask.density to 0.19" in said
    assert not (folder / "run" / "probe").exists()
    assert not (folder / "run" / "logs").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--bank.layer=0", "bank.layer=0: the bank"),
        ("--bank.pooling=max", "bank.pooling='max': the bank"),
        ("--bank.signature=full", "which compare by covariance"),
        ("--target.dtype=bfloat16", "target.dtype='bfloat16': the tasks of the bank"),
        ("--bank.representation=adapted", "has no signature of old under its own weights"),
        ("--target.path=OTHER", "made for the model with fingerprint"),
    ],
)
def test_a_run_that_its_bank_does_not_suit_is_not_begun(
    option: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Such a run had made its bases, probed and projected before."""
    if "OTHER" in option:
        shutil.copytree(folder / "run" / "models" / "target", tmp_path / "other")
        build_tiny(TinyConfig(32, 2, 2, 48), 40, seed=7).save_pretrained(tmp_path / "other")
    own = ["--run_dir", str(tmp_path / "run"), option.replace("OTHER", str(tmp_path / "other"))]
    config = str(folder / "config.yaml")
    assert main(["run", "--config", config, "--mask.isolation", "shared", *own]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "probe").exists()
    assert not (tmp_path / "run" / "logs").exists()


def test_what_has_room_or_shares_is_let_through(folder: Path) -> None:
    cfg = run_config(parse(["run", "--config", str(folder / "config.yaml")])["run"])
    bank = DeltaBank(folder / "bank")
    for mask in (
        MaskConfig(density=0.19, granularity="row", isolation="exclusive"),
        MaskConfig(density=0.3, granularity="row", isolation="soft"),
        MaskConfig(density=0.3, granularity="row"),
    ):
        check_room_beside(replace(cfg, mask=mask), bank)
    one = replace(cfg, tasks=cfg.tasks[:1])
    check_room_beside(one, bank)
    # Its own task, learned before, takes no room from it.
    check_room_beside(replace(cfg, tasks=[replace(cfg.tasks[0], name="old"), cfg.tasks[1]]), bank)
