"""Errors of the command line name the key, its value and what it may be, and what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from trace_dist.cli.parser import parse

CONFIG = "target: {path: m}\ntasks:\n  - {name: a, path: a.jsonl, NUM}\n"


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parse(words)
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("backend", "zero", "backend=zero: must be one of 'single', 'zero3', 'fsdp2'"),
        ("train.lr", "fast", "train.lr=fast: must be a float or 'auto'"),
        ("train.patience", "x", "train.patience=x: must be an int or null"),
        ("continual.methods", "full", "continual.methods=full: must be a list; write [full]"),
        ("proxy", "small", "proxy=small: must be a section of keys and values or null"),
        ("train.stepz", "3", "unrecognized arguments: --train.stepz 3; perhaps --train.steps is meant"),
        ("proxy", "org/small.en", "proxy=org/small.en: must be a section of keys and values or null"),
        ("proxy", "5", "proxy=5: must be a section of keys and values or null"),
        ("target", "org/m", "target=org/m: must be a section of keys and values; perhaps --target.path is meant"),
        ("data", "org/data", "data=org/data: must be a section of keys and values"),
        ("train.betas", "[0.9]", "train.betas=[0.9]: must be a list of 2 values"),
        ("continual.methods", "[yes]", "continual.methods=True: must be a text; put it in quotes (YAML reads yes, no, on and off "
         "as true and false)"),
        ("run_dir", "-x", "--run_dir lacks its value; write --run_dir VALUE, or --run_dir=VALUE where that begins with a dash"),
        ("dry-run", "true", "unrecognized arguments: --dry-run true; perhaps --dry_run is meant"),
        ("colour", "red", "unrecognized arguments: --colour red"),
    ],
)  # fmt: skip
def test_values_and_options(
    option: str, value: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were in types of Python, such as `Does not validate against any of the Union subtypes`."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("NUM", "num_test: 3"))
    words = ["run", "--config", str(path), f"--{option}", value]
    assert said(words, capsys) == f"error: {line}; see trace-dist run --help"


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("num_test: ten", "num_test=ten: must be an int"),
        ("metric: 3", "metric=3: must be a text; put it in quotes"),
        (
            "answers: [yes, 1]",
            "answers=[True, 1]: its entry True must be a text; put it in quotes (YAML reads yes",
        ),
        ("answer_feild: b", "Option 'answer_feild' is not accepted; perhaps answer_field is meant"),
    ],
)
def test_keys_of_a_task(entry: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("NUM", entry))
    assert line in said(["run", "--config", str(path)], capsys)


def test_keys_of_a_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("NUM", "num_test: 3") + "masks: {density: 0.1}\n")
    line = "run does not accept 'masks.density'; perhaps mask.density is meant; see trace-dist run --help"
    assert line in said(["run", "--config", str(path)], capsys)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("run", "run lacks --target.path, --tasks; name a configuration by --config; see trace-dist run --help"),
        ("run my.yaml", "unrecognized arguments: my.yaml; a configuration is named by --config my.yaml; see trace-dist run"),
        ("bank export b", "bank export lacks --base, --out; see trace-dist bank export --help"),
        ("mask show", "mask show lacks file; see trace-dist mask show --help"),
        ("bank", "bank lacks its action, one of {show,verify"),
        ("", "trace-dist lacks its command, one of {run,learn"),
    ],
)  # fmt: skip
def test_what_is_missing(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It was called `run.target.path`, which no option is."""
    assert said(words.split(), capsys).startswith(f"error: {line}")


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("{name: b, path: y, num_test: many}", "num_test=many: must be an int; in {name: b, path: y, num_test: many}"),
        ("{path: y}", "lacks name; in {path: y}"),
        ("{name: b, reasoning_gym: 3}", "reasoning_gym=3: must be a section of keys and values or null; in {name: b, reas"),
        ("just a name", "tasks: its entry just a name must be a section of keys and values"),
        ("3", "tasks: its entry 3 must be a section of keys and values"),
        ("data/b.jsonl", "tasks: its entry data/b.jsonl must be a section of keys and values"),
        ("b.jsonl", "tasks: its entry b.jsonl must be a section of keys and values"),
        ("os.path", "tasks: its entry os.path must be a section of keys and values"),
        ("null", "tasks: its entry null must be a section of keys and values"),
    ],
)  # fmt: skip
def test_the_entry_of_a_list_is_named(
    entry: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was `num_test=many` of any of the tasks, `lacks --name`, or a page on class paths."""
    path = tmp_path / "config.yaml"
    path.write_text(f"{CONFIG.replace('NUM', 'num_test: 3')}  - {entry}\n")
    assert said(["run", "--config", str(path)], capsys).startswith(f"error: {line}")
