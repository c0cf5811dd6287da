"""The configuration refuses what cannot work: each message names the field, its value, the rule and a cure."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from trace_dist import config as c
from trace_dist.cli.main import main
from trace_dist.cli.parser import parse, run_config
from trace_dist.config.renamed import RENAMED
from trace_dist.data.tasks import load_task

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SECTIONS = [each for each in vars(c).values() if is_dataclass(each)]
SMALL: dict[str, Any] = {"run_dir": "r", "target": {"path": "m"}, "tasks": [{"name": "t", "path": "t.jsonl"}]}


def task(**changes: Any) -> c.TaskConfig:
    return c.TaskConfig(**{"name": "t", "path": "t.jsonl"} | changes)


def nf4():
    return c.ModelConfig("m", quantize="nf4")


def run(**changes: Any) -> c.RunConfig:
    return c.RunConfig(**{"run_dir": "r", "target": c.ModelConfig("m"), "tasks": [task()]} | changes)


@pytest.mark.parametrize(
    ("make", "field", "rule"),
    [
        (lambda: c.MaskConfig(density=0), "mask.density", "must lie in (0, 1]"),
        (lambda: c.MaskConfig(density=1.01), "mask.density", "must lie in (0, 1]"),
        (lambda: c.MaskConfig(density=float("nan")), "mask.density", "must be finite"),
        (lambda: c.MaskConfig(block=0), "mask.block", "must be at least 1"),
        (lambda: c.MaskConfig(share_of="tensors"), "mask.share_of", "selects inside tensors"),
        (lambda: c.MaskConfig(granularity="tensor", floor=0.01), "mask.floor", "whole or not at all"),
        (lambda: c.MaskConfig(granularity="tensor", scope="tensor"), "mask.scope", "whole or not at all"),
        (lambda: c.MaskConfig(scope="tensor", cap=0.5), "mask.cap", "every tensor has the same density"),
        (lambda: c.MaskConfig(floor=0.06), "mask.floor", "must lie in [0, mask.density=0.05]"),
        (lambda: c.MaskConfig(cap=0.04), "mask.cap", "must lie in [mask.density=0.05, 1]"),
        (lambda: c.ProbeConfig(epochs=0.0), "probe.epochs", "must be positive"),
        (lambda: c.ProbeConfig(fisher_batch_size=0), "probe.fisher_batch_size", "must be at least 1"),
        (lambda: c.TinyConfig(hidden_size=10, num_heads=3), "tiny.hidden_size", "multiple of num_heads=3"),
        (lambda: c.TinyConfig(steps=-1), "tiny.steps", "must not be negative"),
        (lambda: c.PruneConfig(keep_layers=0), "prune.keep_layers", "must be at least 1"),
        (lambda: c.ModelConfig("m", tiny=c.TinyConfig(), gguf="g"), "model", "at most one of tiny, gguf"),
        (lambda: task(path=None), "tasks.t", "exactly one of path and reasoning_gym"),
        (lambda: task(reasoning_gym={"dataset": "d"}), "tasks.t", "exactly one of path and reasoning_gym"),
        (lambda: task(path=None, reasoning_gym={"size": 1}), "tasks.t.reasoning_gym", "key 'dataset'"),
        (
            lambda: task(path=None, reasoning_gym={"dataset": "d"}, split="x"),
            "tasks.t.split",
            "the source is reasoning_gym",
        ),
        (
            lambda: task(prompt_field="a", prompt_template="{b}"),
            "tasks.t.prompt_template",
            "prompt_field is set too",
        ),
        (
            lambda: task(answer_field="a", answer_template="{b}"),
            "tasks.t.answer_template",
            "answer_field is set too",
        ),
        (
            lambda: task(messages_field="m", answer_field="a"),
            "tasks.t.answer_field",
            "messages_field is set too",
        ),
        (lambda: task(prompt_template="{a"), "tasks.t.prompt_template", "expected '}' before end of string"),
        (lambda: task(prompt_template="a}"), "tasks.t.prompt_template", "single '}' encountered"),
        (lambda: task(prompt_template="{}"), "tasks.t.prompt_template", "braces hold the name of a column"),
        (
            lambda: task(answer_template="{a:>3}"),
            "tasks.t.answer_template",
            "braces hold the name of a column",
        ),
        (lambda: task(answer_template="a"), "tasks.t.answer_template", "names no column"),
        (lambda: task(name=""), "tasks.name", "must be a non-empty text"),
        (lambda: task(name="a/b"), "tasks.name", "must not hold '/'"),
        (lambda: task(name="Base"), "tasks.name", "is reserved for the base model"),
        (lambda: task(num_test=0), "tasks.t.num_test", "must be at least 1"),
        (lambda: c.ProbeConfig(steps=-1), "probe.steps", "must be at least 0"),
        (lambda: c.ProbeConfig(fisher_batches=0), "probe.fisher_batches", "must be at least 1"),
        (lambda: c.TrainConfig(steps=0), "train.steps", "must be at least 1"),
        (lambda: c.TrainConfig(eps=1e-50), "train.eps", "is too small for fp32"),
        (lambda: c.TrainConfig(lr=0), "train.lr", "must be positive"),
        (lambda: c.TrainConfig(sequence_parallel=0), "train.sequence_parallel", "must be at least 1"),
        (
            lambda: run(train=c.TrainConfig(sequence_parallel=2)),
            "train.sequence_parallel",
            "backend single runs in one process",
        ),
        (
            lambda: run(
                train=c.TrainConfig(sequence_parallel=2),
                backend="zero3",
                launch=c.LaunchConfig("torchrun", 3),
            ),
            "train.sequence_parallel",
            "must divide launch.num_ranks=3",
        ),
        (
            lambda: run(
                train=c.TrainConfig(sequence_parallel=2),
                backend="zero3",
                data=c.DataConfig(modality="image", packing=False),
            ),
            "train.sequence_parallel",
            "shares rows of tokens, and data.modality is image",
        ),
        (lambda: c.TrainConfig(weight_decay=-0.1), "train.weight_decay", "must not be negative"),
        (lambda: c.ContinualConfig(methods=[]), "continual.methods", "at least one method"),
        (lambda: c.ContinualConfig(methods=["full", "full"]), "continual.methods", "named twice"),
        (lambda: c.LaunchConfig(num_ranks=0), "launch.num_ranks", "must be at least 1"),
        (lambda: c.LaunchConfig(num_ranks=2), "launch.num_ranks", "needs a launcher"),
        (lambda: run(tasks=[]), "tasks", "at least one task"),
        (lambda: run(general=[task()]), "tasks.name", "names must be unique"),
        (lambda: run(tasks=[task(name="auto")]), "tasks.name", "stands for the task"),
        (lambda: run(target=c.ModelConfig("m", prune=c.PruneConfig())), "target.prune", "only a proxy"),
        (lambda: run(target=nf4()), "target.quantize", "probing trains every weight"),
        (lambda: run(target=nf4(), proxy=nf4()), "proxy.quantize", "probing trains every weight"),
        (lambda: run(launch=c.LaunchConfig("torchrun", 2)), "launch.num_ranks", "backend single runs in one"),
        (lambda: run(tasks=[task(metric="bits_per_byte")]), "tasks.metric", "bits_per_byte is for general"),
        (lambda: c.TinyConfig(num_layers=0), "tiny.num_layers", "must be at least 1"),
        (lambda: task(steps=0), "tasks.t.steps", "must be at least 1"),
        (lambda: c.DataConfig(max_length=1), "data.max_length", "must be at least 2"),
        (lambda: c.DataConfig(num_proc=0), "data.num_proc", "must be at least 1"),
        (lambda: c.ProbeConfig(batch_size=0), "probe.batch_size", "must be at least 1"),
        (lambda: c.ProbeConfig(lr=0), "probe.lr", "must be positive"),
        (lambda: c.ProbeConfig(specificity_weight=-1), "probe.specificity_weight", "must be at least 0"),
        (lambda: c.TrainConfig(betas=(0.9, 1.0)), "train.betas", "both must lie in [0, 1)"),
        (lambda: c.TrainConfig(max_grad_norm=0), "train.max_grad_norm", "must be positive"),
        (lambda: c.TrainConfig(min_lr_ratio=2), "train.min_lr_ratio", "must lie in [0, 1]"),
        (lambda: c.BankConfig(clusters=0), "bank.clusters", "must be at least 1"),
        (lambda: c.BankConfig(candidates=0), "bank.candidates", "must be at least 1"),
        (lambda: c.BankConfig(reject=0.0), "bank.reject", "must lie in (0, 1)"),
        (lambda: c.BankConfig(reject=1.0), "bank.reject", "must lie in (0, 1)"),
        (lambda: c.BankConfig(signature="nearest"), "bank.signature", "there is no such part"),
        (lambda: c.EvalConfig(max_new_tokens=0), "eval.max_new_tokens", "must be at least 1"),
        (lambda: c.LaunchConfig(parallel_stages=0), "launch.parallel_stages", "must be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rules(make: Callable[[], object], field: str, rule: str) -> None:
    with pytest.raises(ValueError, match=r"=.*; ") as caught:
        make()
    message = str(caught.value)
    name, _, rest = message.partition("=")
    value_and_rule, semicolon, cure = rest.rpartition(";")
    assert name == field
    assert rule in value_and_rule
    assert semicolon
    assert len(cure.split()) >= 2
    assert "\n" not in message


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_sections_are_frozen_and_every_field_is_explained(section: type) -> None:
    assert section.__dataclass_params__.frozen
    lines = "".join(inspect.getsource(each) for each in section.__mro__ if is_dataclass(each)).splitlines()
    for each in fields(section):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"    {each.name}: "))
        assert lines[at + 1].strip().startswith('"""'), f"{section.__name__}.{each.name} has no docstring"
    assert get_type_hints(section)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        run().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_valid_and_open_with_hardware_and_time(
    path: Path, tmp_path: Path
) -> None:
    written = yaml.safe_load(path.read_text())
    # Beside that of the run a study may have keys of its own.
    written = written.get("run", written)
    (tmp_path / path.name).write_text(yaml.safe_dump(written))
    words = ["run"]
    if "study" in written:
        words = ["study", "one-model" if "orders" in written["study"] else "small-to-large"]
    values = parse([*words, "--config", str(tmp_path / path.name)])
    for word in words:
        values = values[word]
    cfg = run_config(values)
    assert [each.name for each in cfg.tasks] == [each["name"] for each in written["tasks"]]
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("Hardware" in line for line in header)
    assert any("ime" in line for line in header)


def test_overrides_and_defaults() -> None:
    arguments = [
        "train",
        "--config",
        str(ROOT / "configs/quickstart.yaml"),
        "--mask.density",
        "0.01",
        "--train.betas",
        "[0.8,0.9]",
    ]
    arguments += ["--train.max_grad_norm", "null", "--task_name", "spiral"]
    values = parse(arguments)["train"]
    cfg = run_config(values)
    assert (cfg.mask.density, cfg.train.betas, cfg.train.max_grad_norm) == (0.01, (0.8, 0.9), None)
    assert values["task_name"] == "spiral"
    assert cfg.data == c.DataConfig()
    assert cfg.probed is cfg.proxy
    assert run().probed == c.ModelConfig("m")


def test_help_shows_the_docstrings_of_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Share of the maskable elements that are trained, in (0, 1]." in text
    assert "name of the task to train; the first one when not given" in text


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["train"], "train lacks --target.path, --tasks"),
        ([], "{run,learn,consolidate,base"),
        (["mask", "show"], "file"),
        (["mask", "combine", "union", "a", "b", "--out", "c"], "invalid choice: 'combine'"),
    ],
)
def test_missing_arguments(arguments: list[str], fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert fragment in line


def refused(config: Any, folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a configuration ends in."""
    path = folder / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    try:
        code = main(["probe", "--config", str(path), *words])
    except SystemExit as left:
        code = left.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def changed(name: str, value: Any) -> dict[str, Any]:
    """The small configuration with a field or a section set."""
    config = copy.deepcopy(SMALL)
    *parents, last = name.split(".")
    place = config
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    return config


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_no_number_may_be_infinite(section: type, value: float) -> None:
    listed = {"name": "t", "path": "t.jsonl"}
    needed = {"ModelConfig": {"path": "m"}, "TaskConfig": listed, "GeneralConfig": listed}
    floats = [each.name for each in fields(section) if "float" in str(each.type)]
    for name in floats:
        given = (value, 0.9) if name == "betas" else value
        with pytest.raises(ValueError, match=rf"{name}.*: must be finite"):
            section(**needed.get(section.__name__, {}), **{name: given})
    for name in (each.name for each in fields(section) if "dict" in str(each.type)):
        options = {"dataset": "d", "full": {"lr": value}, "lr": value}
        with pytest.raises(ValueError, match=r"\.lr=.*: must be finite"):
            section(**{"name": "t"} if issubclass(section, c.TaskConfig) else {}, **{name: options})


@pytest.mark.parametrize("value", [10**400, -(2**63) - 1, 2**63])
def test_integers_fit_into_64_bits(value: int) -> None:
    with pytest.raises(ValueError, match=r"^train\.steps=-?\d+: must fit into 64 bits"):
        c.TrainConfig(steps=value)
    with pytest.raises(ValueError, match=r"^tasks\.t\.reasoning_gym\.size=-?\d+: must fit into 64 bits"):
        c.TaskConfig("t", reasoning_gym={"dataset": "d", "size": value})


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_a_library_would_refuse_later_is_refused_at_once(seed: int) -> None:
    options = {"run_dir": "run", "target": c.ModelConfig("m"), "tasks": [c.TaskConfig("t", path="t.jsonl")]}
    with pytest.raises(ValueError, match=rf"^seed={seed}: must lie between 0 and 2\*\*32 - 1"):
        c.RunConfig(**options, seed=seed)
    assert c.RunConfig(**options, seed=2**32 - 1).seed == 2**32 - 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((section, value) for section in ("probe", "mask", "continual", "launch") for value in (-1, [1], None, "text", True)),
        *(("target", value) for value in (3, [1], None, "text")),
        *(("target.tiny", value) for value in (3, [1], "text")),
        *(("tasks", value) for value in (3, {}, [3], ["text"], [None], None)),
        *(("continual.options", value) for value in (3, {"lora": 3}, {"lora": [1]})),
        *(("projection.options", value) for value in (3, [1])),
        *((field, None) for field in ("train.lr", "probe.score", "seed", "run_dir", "mask.block")),
        *(("train.lr", value) for value in (10**400, {}, [1], True)),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_another_shape_is_one_line(
    name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name.split(".")[0] in refused(changed(name, value), tmp_path, capsys) or value == 10**400


@pytest.mark.parametrize("text", ["3", "[1]", "text", "7: 3", "? [a]\n: b"])
def test_a_file_that_is_no_configuration_is_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(text, tmp_path, capsys)


@pytest.mark.parametrize("kind", ["flow", "block", "map", "aliases", "in a mapping"])
def test_a_file_that_explodes_is_refused_at_once(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grow = "\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]" for i in range(1, 30))
    text = {
        "flow": "a: " + "[" * 20000 + "]" * 20000,
        "block": "\n".join("  " * depth + "a:" for depth in range(300)),
        "map": "{a: " * 20000 + "1" + "}" * 20000,
        "aliases": f"k0: &k0 [a, a]\n{grow}",
        "in a mapping": "probe:\n  steps: " + "[" * 20000 + "]" * 20000,
    }[kind]
    line = refused(text, tmp_path, capsys)
    assert ("nested more than" if kind != "aliases" else "aliases") in line


@pytest.mark.parametrize("old", RENAMED)
def test_a_key_of_an_earlier_version_names_the_new_one(
    old: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = ["retrieved"] if "mode" in old else 0.5
    assert f"{old}: the key has another name now; use {RENAMED[old]}" in refused(
        changed(old, value), tmp_path, capsys
    )
    words = (f"--{old}", json.dumps(value))
    assert f"use {RENAMED[old]}" in refused(SMALL, tmp_path, capsys, *words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("probe.score", "l3"),
        ("tasks", [{"name": "t", "path": "t.jsonl", "metric": "rouge"}]),
        ("projection.placement", "narow"),
        ("continual.methods", ["retrieved", "ful"]),
        ("continual.options", {"ful": {"lr": 1.0}}),
        ("launch.single_process", ["mergd"]),
    ],
)
def test_an_unknown_part_is_named_with_those_that_exist(
    name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(changed(name, value), tmp_path, capsys)
    assert "there is no such part; choose among" in line


def test_options_of_a_part_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(changed("projection.options", {"steps": 9, "lr": 0.5})))
    words = ["--projection.options.steps", "4", "--continual.options.lora.rank", "7"]
    cfg = run_config(parse(["probe", "--config", str(path), *words])["probe"])
    assert cfg.projection.options == {"steps": 4, "lr": 0.5}
    assert cfg.continual.options == {"lora": {"rank": 7}}


def test_home_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no folder of the name ~ is made, and all commands mean the same one."""
    monkeypatch.setenv("HOME", "/home/me")
    models = {"target": c.ModelConfig("~/t"), "proxy": c.ModelConfig("~/p", gguf="~/p.gguf")}
    launch = c.LaunchConfig("torchrun", 2, hostfile="~/hosts")
    cfg = run(run_dir="~/r", bank=c.BankConfig(path="~/b"), launch=launch, backend="zero3", **models)
    found = [cfg.run_dir, cfg.bank.path, cfg.target.path, cfg.proxy.path, cfg.proxy.gguf, cfg.launch.hostfile]
    assert found == [f"/home/me/{name}" for name in ("r", "b", "t", "p", "p.gguf", "hosts")]
    assert run(run_dir="", bank=c.BankConfig(path="~/b")).run_dir == "/home/me/b.work/t"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"run_dir": "a/../b", "bank": c.BankConfig(path=f"{Path.cwd()}/b")}, ("bank.path", "run_dir")),
        ({"run_dir": "m", "target": c.ModelConfig("m", tiny=c.TinyConfig())}, ("target.path", "run_dir")),
        ({"proxy": c.ModelConfig("./m", prune=c.PruneConfig())}, ("proxy.path", "target.path")),
        ({"proxy": c.ModelConfig("r", tiny=c.TinyConfig())}, ("proxy.path", "run_dir")),
        ({"proxy": c.ModelConfig("m"), "target": c.ModelConfig("m", dtype="bfloat16")}, None),
        ({name: c.ModelConfig("m", tiny=c.TinyConfig()) for name in ("proxy", "target")}, None),
    ],
)  # fmt: skip
def test_what_a_run_fills_has_a_folder_of_its_own(
    changes: dict[str, Any], names: tuple[str, str] | None
) -> None:
    if names is None:
        run(**changes)
        return
    with pytest.raises(ValueError, match=rf"^{names[0]}='.*': is the folder of {names[1]}, too; give each"):
        run(**changes)


@pytest.mark.parametrize(
    ("general", "line"),
    [
        ("num_test: 0", r"general\.abilities\.num_test=0: must be at least 1"),
        ("metric: luck", r"general\.abilities\.metric='luck': there is no such part"),
        (
            "split: test",
            r"general\.abilities\.path='.*other\.jsonl': no split 'test', .* name one by general\.abilities\.split",
        ),
        ("prompt_field: nothing", r"set general\.abilities\.prompt_field to one of them"),
    ],
)
def test_a_general_set_is_called_by_its_list(general: str, line: str, tmp_path: Path) -> None:
    """It was `tasks.abilities`, which no key of the file is."""
    for name in ("mine", "other"):
        (tmp_path / f"{name}.jsonl").write_text(
            '{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n'
        )
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\ntarget: {{path: m}}\ntasks:\n  - {{name: one, path: {tmp_path}/mine.jsonl}}\n"
        f"general:\n  - {{name: abilities, path: {tmp_path}/other.jsonl, {general}}}\n"
    )
    with pytest.raises(ValueError, match=line):
        load_task(run_config(parse(["run", "--config", str(path)])["run"]).general[0], seed=0)
