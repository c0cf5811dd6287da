"""What a command does with the configuration that lies in its run folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from bank.samples import base_model, make_delta, signature
from transformers import LlamaConfig

from trace_dist.bank.bank import DeltaBank
from trace_dist.cli import commands
from trace_dist.cli.parser import parse, run_config
from trace_dist.config import ContinualConfig, LaunchConfig, MaskConfig, ModelConfig, RunConfig, TaskConfig
from trace_dist.stages import start as starting
from trace_dist.stages.start import start
from trace_dist.utils.locks import release


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    tasks = [TaskConfig(name="t", path="t.jsonl")]
    return RunConfig(run_dir=str(tmp_path / "run"), target=ModelConfig("m"), tasks=tasks)


def stored(cfg: RunConfig) -> dict:
    return yaml.safe_load((Path(cfg.run_dir) / "config.yaml").read_text())


def test_the_configuration_is_kept_beside_the_results(cfg: RunConfig) -> None:
    start(cfg, "base")
    assert stored(cfg)["target"]["path"] == "m"
    before = (Path(cfg.run_dir) / "config.yaml").stat().st_mtime_ns
    start(cfg, "base")
    assert (Path(cfg.run_dir) / "config.yaml").stat().st_mtime_ns == before


def test_other_values_are_refused_once_there_is_a_result(cfg: RunConfig) -> None:
    start(cfg, "base")
    start(replace(cfg, seed=1), "base")  # nothing was made yet: a mistake may be mended
    assert stored(cfg)["seed"] == 1
    (Path(cfg.run_dir) / "models" / "target").mkdir(parents=True)
    start(cfg, "base")
    (Path(cfg.run_dir) / "models" / "target" / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"run_dir='.*/run': .* other values of data\.max_length, seed; choose"
    ):
        start(replace(cfg, seed=1, data=replace(cfg.data, max_length=9)), "base")
    assert stored(cfg)["seed"] == 0


def test_how_a_run_is_carried_out_may_differ(cfg: RunConfig) -> None:
    """A stage leaves the file alone; `run` writes its own values, since its stages read them there."""
    (Path(cfg.run_dir)).mkdir()
    (Path(cfg.run_dir) / "metrics.jsonl").write_text("")
    start(cfg, "base")
    launched = replace(
        cfg,
        backend="zero3",
        launch=LaunchConfig("deepspeed", 2),
        continual=ContinualConfig(methods=["full"]),
    )
    start(launched, "base")
    assert stored(cfg)["backend"] == "single"
    start(launched, "run")
    assert stored(cfg)["backend"] == "zero3"
    assert stored(cfg)["launch"]["num_ranks"] == 2
    start(cfg, "base")
    assert stored(cfg)["backend"] == "zero3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: "{{{", "cannot be read .*; restore it or delete the run folder"),
        (
            lambda kept: f"{kept}\nwhen: 2026-99-99\n",
            "cannot be read .*; restore it or delete the run folder",
        ),
        (lambda kept: f"{kept}\n1: 2\nx: 3\n", "corrupt configuration file"),
    ],
)
def test_a_damaged_configuration_is_one_line(
    change: Callable[[str], str], message: str, cfg: RunConfig
) -> None:
    start(cfg, "base")
    path = Path(cfg.run_dir) / "config.yaml"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"config\.yaml: {message}") as caught:
        start(cfg, "base")
    assert "\n" not in str(caught.value)


@pytest.fixture
def whole(tmp_path: Path) -> RunConfig:
    """A run whose models, data and bank lie in its folder, beside it, and far from it; with results of all kinds."""
    here = tmp_path / "work" / "run"
    (here / "models").mkdir(parents=True)
    models = [ModelConfig(str(here / "models" / "target")), ModelConfig(str(tmp_path / "far" / "proxy"))]
    tasks = [TaskConfig("t", str(here / "t.jsonl")), TaskConfig("u", str(tmp_path / "work" / "u.jsonl"))]
    tasks.append(TaskConfig("v", str(tmp_path / "far" / "v.jsonl")))
    cfg = RunConfig(models[0], tasks, str(here), proxy=models[1])
    cfg = replace(cfg, bank=replace(cfg.bank, path=str(tmp_path / "work" / "bank")))
    start(cfg, "continual")
    for name in (
        "methods/retrieved.json",
        "masks/t.safetensors",
        "probe/t.safetensors",
        "metrics.jsonl",
        "eval.json",
    ):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("")
    release()
    return cfg


def read(path: Path, *more: str) -> RunConfig:
    return run_config(parse(["report", "--config", str(path), *more])["report"])


def test_a_moved_run_folder_is_taken_as_it_is(whole: RunConfig, tmp_path: Path) -> None:
    """With what lies beside it, by its own configuration or by one that names the new place."""
    new = tmp_path / "archive" / "old-run"
    new.parent.mkdir()
    Path(whole.run_dir).rename(new)
    cfg = read(new / "config.yaml")
    assert cfg.run_dir == str(new)
    assert cfg.target.path == str(new / "models" / "target")
    assert [task.path for task in cfg.tasks] == [
        str(new / "t.jsonl"),
        *(task.path for task in whole.tasks[1:]),
    ]
    assert cfg.bank.path == whole.bank.path
    start(cfg, "continual")
    assert stored(cfg)["run_dir"] == str(new)
    assert stored(cfg)["tasks"][0]["path"] == str(new / "t.jsonl")
    assert read(new / "config.yaml") == cfg
    assert read(new / "config.yaml", "--run_dir", "elsewhere").run_dir == "elsewhere"


def test_a_folder_that_moves_with_its_neighbours(whole: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "work").rename(tmp_path / "moved")
    paths = {"run_dir": tmp_path / "moved" / "run", "bank.path": tmp_path / "moved" / "bank"}
    paths["tasks[1].path"] = tmp_path / "moved" / "u.jsonl"
    kept = tmp_path / "moved" / "run" / "config.yaml"
    cfg = read(kept)
    cfg = replace(cfg, bank=replace(cfg.bank, path=str(paths["bank.path"])))
    cfg = replace(
        cfg, tasks=[cfg.tasks[0], replace(cfg.tasks[1], path=str(paths["tasks[1].path"])), cfg.tasks[2]]
    )
    start(cfg, "continual")
    assert stored(cfg)["bank"]["path"] == str(paths["bank.path"])


def test_home_was_kept_as_it_was_written(whole: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an earlier release, which found models there all the same."""
    monkeypatch.setenv("HOME", str(Path(whole.proxy.path).parent))
    kept = Path(whole.run_dir) / "config.yaml"
    kept.write_text(kept.read_text().replace(whole.proxy.path, "~/proxy"))
    start(whole, "continual")


def test_other_places_are_other_values(whole: RunConfig, tmp_path: Path) -> None:
    """A copy whose original is still there is a folder of its own, and other data are other data."""
    shutil.copytree(whole.run_dir, tmp_path / "copy")
    assert read(tmp_path / "copy" / "config.yaml") == whole
    other = replace(whole, tasks=[*whole.tasks[:2], replace(whole.tasks[2], path="other.jsonl")])
    with pytest.raises(ValueError, match=r"made with other values of tasks\.v\.path; choose"):
        start(other, "continual")
    own = tmp_path / "mine" / "config.yaml"
    own.parent.mkdir()
    own.write_text(
        (Path(whole.run_dir) / "config.yaml").read_text().replace(whole.run_dir, str(tmp_path / "new"))
    )
    assert read(own).run_dir == str(tmp_path / "new")


def test_a_project_is_no_moved_run(whole: RunConfig, tmp_path: Path) -> None:
    """A user's config.yaml beside files that are named as a run's, and one that a run has kept but a user has changed."""
    project = tmp_path / "project"
    for name in ("logs/job-1.log", "methods/mine.py", "results.json", "metrics.jsonl"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("")
    own = "run_dir: runs/a\ntarget: {path: m}\ntasks: [{name: t, path: t.jsonl}]\n"
    (project / "config.yaml").write_text(own)
    assert read(project / "config.yaml").run_dir == "runs/a"
    kept = Path(whole.run_dir) / "config.yaml"
    kept.write_text(kept.read_text().replace(f"run_dir: {whole.run_dir}", "run_dir: runs/b"))
    assert read(kept).run_dir == "runs/b"


def test_a_run_of_an_earlier_release_has_no_mark(whole: RunConfig, tmp_path: Path) -> None:
    whole.folder.mark.unlink()
    new = Path(whole.run_dir).rename(tmp_path / "moved")
    assert read(new / "config.yaml").run_dir == str(new)
    (new / "metrics.jsonl").unlink()
    assert read(new / "config.yaml").run_dir == whole.run_dir


def test_texts_that_look_like_numbers_are_kept_as_texts(cfg: RunConfig) -> None:
    answers = ["1e5", "-1.5e3", ".5E+2", "7", "1.0", "true", "null", "2026-01-01", "1:30", "a"]
    cfg = replace(cfg, tasks=[replace(cfg.tasks[0], name="1e3", revision="12e4", answers=answers)])
    start(cfg, "base")
    assert read(cfg.folder.config) == cfg


def test_a_report_is_of_the_configuration_that_was_kept(
    whole: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows of the results are of the tasks as they were learned, whatever order the file of the user has by now."""
    seen: list[RunConfig] = []
    monkeypatch.setattr(commands, "say_report", lambda cfg, picture: seen.append(cfg))
    monkeypatch.setattr(logging.getLogger("trace_dist"), "propagate", True)
    commands.report_command(whole)
    assert not caplog.records
    commands.report_command(replace(whole, tasks=whole.tasks[::-1], backend="zero3"))
    assert seen == [whole, whole]
    assert "other values of tasks" in caplog.text
    shutil.copytree(whole.run_dir, tmp := Path(whole.run_dir).with_name("copy"))
    commands.report_command(replace(whole, run_dir=str(tmp)))
    assert seen[-1].folder.root == tmp


def test_a_command_in_another_folder(whole: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(whole.run_dir).parent)
    start(
        replace(whole, run_dir="run", tasks=[replace(whole.tasks[0], path="run/t.jsonl"), *whole.tasks[1:]]),
        "base",
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"density": 1e-6}, r"^mask\.density=1e-06: less than half of the smallest unit \(1 of .* raise it above"),
        ({"density": 1e-3, "granularity": "row"}, r"smallest unit \(16 of 3,584 elements\) of the target, .*finer"),
        ({"maskable": "c_attn"}, r"^target\.path='.*': mask\.maskable='c_attn': matches no parameter"),
        ({"granularity": "row,q=head", "density": 0.9}, None),
        ({"density": 1e-3, "granularity": "tensor", "share_of": "tensors"}, r"smallest unit \(1 of 14 tensors\)"),
    ],
)  # fmt: skip
def test_a_mask_that_cannot_be_is_refused_first(
    mask: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    """By the shapes of the target, which its config alone says."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaConfig(**sizes, num_hidden_layers=2).save_pretrained(tmp_path / "model")
    cfg = RunConfig(
        run_dir=str(tmp_path / "run"),
        target=ModelConfig(str(tmp_path / "model")),
        tasks=[TaskConfig(name="t", path="t.jsonl")],
        mask=MaskConfig(**mask),
    )
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        start(cfg, "run")
    start(cfg, "report")  # which makes no masks


@pytest.mark.parametrize(
    ("command", "where", "checked"),
    [("learn", "bank", True), ("learn", None, False), ("learn", "run/b", False), ("eval", "bank", False)],
)
def test_a_bank_elsewhere_must_be_seen_by_all_hosts(
    cfg: RunConfig, tmp_path: Path, command: str, where: str | None, checked: bool, monkeypatch: Any
) -> None:
    """As the run folder must, in which other banks lie; by a file that this command holds."""
    seen: list[str] = []

    def check(path: Path, what: str) -> None:
        assert path.read_text()
        seen.append(what)

    monkeypatch.setattr(starting, "check_shared", check)
    monkeypatch.setattr(starting, "check_parts", lambda _: None)
    path = None if where is None else str(tmp_path / where)
    cfg = replace(cfg, bank=replace(cfg.bank, path=path), continual=ContinualConfig(methods=["retrieved"]))
    start(cfg, command, mask_file="m")
    assert seen == [f"run_dir={cfg.run_dir!r}", *([f"bank.path={path!r}"] if checked else [])]


def test_a_run_into_a_bank_that_has_its_tasks_is_refused_first(cfg: RunConfig, tmp_path: Path) -> None:
    """Unless it has begun them: then it is gone on with, and `continual.learn` compares."""
    bank = DeltaBank.create(tmp_path / "bank", "aaaa", layer=1)
    bank.add(signature("t", 1), make_delta(base_model(), "t", 1))
    cfg = replace(cfg, bank=replace(cfg.bank, path=str(bank.folder)))
    with pytest.raises(
        ValueError, match=r"^tasks\.name='t': the bank .*/bank holds a task of this name; rename one"
    ):
        commands._check_bank(cfg)
    assert not Path(cfg.run_dir).exists()
    cfg.folder.mask("t").parent.mkdir(parents=True)
    cfg.folder.mask("t").write_text("")
    with pytest.raises(ValueError, match=r"^bank\.layer=-1: the bank"):
        commands._check_bank(cfg)


@pytest.mark.parametrize(
    "command",
    [
        lambda cfg: commands.run_command(cfg, dry_run=False),
        lambda cfg: commands.learn_command(cfg, None, dry_run=False),
        commands.continual_command,
    ],
    ids=["run", "learn", "continual"],
)
def test_commands_that_learn_compare_their_examples_first(
    command: Callable[[RunConfig], None], cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their stages do not read them once more for that."""

    def refuse(_: RunConfig) -> None:
        raise ValueError("others")

    monkeypatch.setattr("trace_dist.continual.same_examples.check_examples", refuse)
    monkeypatch.setattr(commands, "start", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"^others$"):
        command(cfg)
    monkeypatch.setattr(commands, "run_holders", lambda: ["process 1"])
    commands._check_examples(cfg)
