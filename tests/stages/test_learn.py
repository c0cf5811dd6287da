"""Tasks that arrive later: learned from configurations of their own into a bank that exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.program import (
    environment,
    error_line,
    make_config,
    run,
    run_here,
    wait_for,
    write_config,
    write_tasks,
)
from launching import free_port, python, rank_environment

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.config import ModelConfig, RunConfig, TaskConfig
from trace_dist.masks.mask import Mask
from trace_dist.masks.units import UnitLayout
from trace_dist.run_folder import BankFolder
from trace_dist.stages import learn

LATER = "later"
ONE_PROCESS = ["--backend", "single"]


def learned(folder: Path) -> dict[str, bytes]:
    """Deltas, signatures and sketches of a bank."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def scores(config: Path, bank: Path, cache: Path) -> dict[str, float]:
    """What ``eval`` says of the tasks of a configuration."""
    done = run_here("eval", "--config", config, "--bank_folder", bank, cache=cache)
    assert done.returncode == 0, done.stderr
    return json.loads((Path(config).parent / "run" / "eval.json").read_text())["scores"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tasks, and the examples of a third."""
    folder = tmp_path_factory.mktemp("learn")
    write_tasks(folder)
    rows = [{"prompt": f"{LATER}: {i:02d} ?", "answer": "abcd"[i % 4]} for i in range(60)]
    (folder / f"{LATER}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(folder) | {"continual": {"methods": ["retrieved"]}}
    config["bank"] |= {"layer": 0}
    done = run("run", "--config", write_config(folder, config), cache=folder / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def later(first: Path, tmp_path: Path) -> Callable[..., Path]:
    """A configuration of the third task alone, in a folder of its own, with a copy of the first run's bank."""

    def make(**changes: Any) -> Path:
        whole = make_config(first)
        models = {name: {"path": whole[name]["path"]} for name in ("target", "proxy")}
        kept = {name: whole[name] for name in ("probe", "projection", "train")}
        tasks = [{"name": LATER, "path": str(first / f"{LATER}.jsonl")}]
        return write_config(tmp_path, models | kept | {"tasks": tasks} | changes, "later.yaml")

    return make


def held(bank: Path) -> bool:
    """Whether a command fills a bank, and has said who it is."""
    lock = BankFolder(bank).command_lock
    return lock.is_file() and bool(lock.read_text())


def test_a_task_is_learned_the_next_day(first: Path, later: Callable[..., Path], tmp_path: Path) -> None:
    """Earlier files stay as they are, all tasks are retrieved, and scores of the earlier ones do not change.

    Whoever would change the bank meanwhile is told who is at work.
    """
    bank, cache = first / "run" / "bank", first / "cache"
    before, scored = learned(bank), scores(first / "config.yaml", bank, cache)
    other = later(tasks=[{"name": "other", "path": str(first / f"{LATER}.jsonl")}]).rename(
        tmp_path / "other.yaml"
    )
    with ThreadPoolExecutor(1) as pool:
        learning = pool.submit(run, "learn", "--config", later(), "--bank", bank, cache=cache)
        assert wait_for(lambda: held(bank) or learning.done(), 100)
        for words in (
            ("bank", "remove", bank, "copy"),
            ("bank", "add", bank, bank / "tasks" / "copy", "--name", "again"),
            ("learn", "--config", other, "--bank", bank),
            ("run", "--config", first / "config.yaml"),
        ):
            said = error_line(run_here(*words, cache=cache))
            assert re.search(r"process \d+ on .* is at work in it; (wait|end)", said), said
        assert not learning.done()
    done = learning.result()
    assert done.returncode == 0, done.stderr[-3000:]
    assert not held(bank)
    after = learned(bank)
    assert {name: after[name] for name in before} == before
    assert DeltaBank(bank).tasks == [BASE, "copy", "twist", LATER]
    assert DeltaBank(bank).sketch(LATER) is not None
    assert DeltaBank(bank).facts(LATER)["training"]["steps"] == 4
    assert scores(first / "config.yaml", bank, cache) == scored
    work = Path(f"{bank}.work") / LATER
    result = json.loads((work / "methods" / "retrieved.json").read_text())
    assert result["retrieval"]["columns"] == [BASE, "copy", "twist", LATER]
    assert result["retrieval"]["accuracy"] == 100
    # All tasks are compared with each other, those of the earlier run by their sketches.
    assert json.loads((work / "probe" / "specificity.json").read_text())["tasks"] == ["copy", "twist", LATER]
    again = run("learn", "--config", later(), "--bank", bank, cache=cache)
    assert again.returncode == 0, again.stderr[-3000:]
    assert learned(bank) == after


@pytest.mark.launcher
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    ],
    ids=["deepspeed", "torchrun"],
)
def test_learned_under_a_launcher(
    launcher: list[str], first: Path, later: Callable[..., Path], tmp_path: Path
) -> None:
    """A new bank by two ranks; the proxy is probed by one process meanwhile."""
    bank = tmp_path / "bank"
    options = ["--bank", bank, "--backend", "zero3", "--launch.num_ranks", 2, "--launch.launcher", "torchrun"]
    module = "--module" if "deepspeed" in launcher[1] else "-m"
    start = [*launcher, str(free_port()), module]
    done = run("learn", "--config", later(), *options, cache=first / "cache", launcher=start)
    assert done.returncode == 0, done.stderr[-3000:]
    assert DeltaBank(bank).tasks == [LATER]
    assert DeltaBank(bank).sketch(LATER) is not None


def test_killed_between_and_inside_the_steps(first: Path, later: Callable[..., Path], tmp_path: Path) -> None:
    """`kill -9` of all of it, or of one of two ranks, whose other one ends by itself: the bank is that of an uncut learning."""
    # The bank may hold the third task by now.
    tasks = [{"name": "fourth", "path": str(first / f"{LATER}.jsonl")}]
    config = later(train=make_config(first)["train"] | {"checkpoint_every": 2}, tasks=tasks)
    shutil.copytree(first / "run" / "bank", tmp_path / "whole" / "bank")
    done = subprocess.run(
        [python(), Path(__file__).with_name("lives_of_learn.py"), tmp_path, config, "fourth"],
        env=environment(first / "cache") | {"PYTHONPATH": rank_environment()["PYTHONPATH"]},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=first,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    for ranks in ("", "-ranks"):
        whole, killed = (tmp_path / f"{life}{ranks}" / "bank" for life in ("whole", "killed"))
        assert DeltaBank(whole).tasks[-1] == "fourth"
        assert learned(killed) == learned(whole)
        assert (killed / "bank.json").read_bytes() == (whole / "bank.json").read_bytes()


def test_learned_with_a_mask_of_ones_own(first: Path, later: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing is probed, and the delta is on that mask."""
    bank, file = tmp_path / "bank", first / "run" / "masks" / "copy.safetensors"
    done = run("learn", "--config", later(), "--bank", bank, "--mask_file", file, cache=first / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    assert DeltaBank(bank).mask(LATER) == Mask.load(file)
    assert DeltaBank(bank).sketch(LATER) is None
    work = Path(f"{bank}.work") / LATER
    assert not (work / "probe").exists()
    before, kept = learned(bank), (work / "masks" / f"{LATER}.safetensors").read_bytes()
    other = ["--mask_file", first / "run" / "masks" / "twist.safetensors"]
    done = run_here("learn", "--config", later(), "--bank", bank, *other, cache=first / "cache")
    assert f"holds '{LATER}', learned on another mask; leave it out" in error_line(done)
    assert (learned(bank), (work / "masks" / f"{LATER}.safetensors").read_bytes()) == (before, kept)


def test_a_learning_that_was_cut_is_not_gone_on_with_on_another_mask(tmp_path: Path) -> None:
    cfg = RunConfig(ModelConfig("m"), [TaskConfig("t", "t.jsonl")], str(tmp_path / "run"))
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for at, file in enumerate(files):
        Mask({"w": torch.tensor([at])}, {"w": UnitLayout((4,), 1)}, "element").save(file)
    begun = cfg.folder.checkpoints(learn.METHOD, "t") / "step-00000001"
    kept, race = cfg.folder.mask("t"), cfg.folder.race(learn.METHOD)
    learn._take_mask(cfg, files[0])
    begun.mkdir(parents=True)
    learn._take_mask(cfg, files[0])
    with pytest.raises(
        ValueError,
        match=rf"^mask_file='{files[1]}': 't' is being .* give {kept} to .* delete {begun.parent} to",
    ):
        learn._take_mask(cfg, files[1])
    assert Mask.load(kept) == Mask.load(files[0])
    begun.rmdir()
    race.parent.mkdir(parents=True)
    race.write_text("{}")
    learn._take_mask(cfg, files[1])
    assert Mask.load(kept) == Mask.load(files[1])
    assert not race.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": [{"name": "copy", "path": "copy.jsonl"}]}, "holds a task of this name"),
        (
            {"target": {"path": "run/models/proxy"}, "tasks": [{"name": "other", "path": f"{LATER}.jsonl"}]},
            "load the model it was made for",
        ),
        (
            {
                "target": {"path": "run/models/target", "dtype": "bfloat16"},
                "tasks": [{"name": "other", "path": f"{LATER}.jsonl"}],
            },
            "target.dtype='bfloat16': the tasks of the bank",
        ),
    ],
    ids=["name", "base", "dtype"],
)
def test_what_the_bank_cannot_take_is_refused_first(
    changes: dict[str, Any], words: str, first: Path, later: Callable[..., Path], tmp_path: Path
) -> None:
    bank = first / "run" / "bank"
    before = learned(bank)
    for section in changes.values():
        for entry in section if isinstance(section, list) else [section]:
            entry["path"] = str(first / entry["path"])
    done = run_here(
        "learn",
        "--config",
        later(**changes, run_dir=str(tmp_path / "r")),
        "--bank",
        bank,
        cache=first / "cache",
    )
    assert words in error_line(done)
    assert not (tmp_path / "r" / "probe").exists()
    assert learned(bank) == before


def test_a_task_that_the_bank_holds_no_more_is_not_said_to_be_learned(tmp_path: Path) -> None:
    """It was removed or renamed there; the run folder has the result of its learning."""
    tasks = [TaskConfig(name, "t.jsonl") for name in ("t", "u")]
    cfg = RunConfig(ModelConfig("m"), tasks, str(tmp_path / "run"))
    result = cfg.folder.method(learn.METHOD)
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    with pytest.raises(
        ValueError, match=rf"^run_dir='{cfg.run_dir}': .* holds no t, u; delete {cfg.run_dir} to"
    ):
        learn.run_learn(cfg)
    with pytest.raises(ValueError, match="holds no u;"):
        learn._check_result(cfg, ["t"])
    learn._check_result(cfg, ["t", "u"])
