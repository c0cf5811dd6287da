"""Configurations and data that come with the package."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

import trace_dist
from trace_dist.cli.main import main
from trace_dist.cli.parser import parse, run_config
from trace_dist.config import TaskConfig
from trace_dist.config.examples import FOLDER, example_config, example_file
from trace_dist.data import load_examples
from trace_dist.stages.probe import run_probe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_a_configuration_is_read_by_its_name(form: str) -> None:
    for path in FOLDER.glob("*.yaml"):
        words = ["run", *form.format(f"example:{path.stem}").split()]
        assert run_config(parse(words)["run"]) == run_config(parse(["run", "--config", str(path)])["run"])


def test_the_quickstart_is_the_checkouts() -> None:
    assert (FOLDER / "quickstart.yaml").read_text() == (ROOT / "configs/quickstart.yaml").read_text()


def test_its_data_lie_beside_it() -> None:
    """All that the configuration names, wherever the command is started; and nothing that it does not."""
    cfg = run_config(parse(["run", "--config", "example:words"])["run"])
    sets = [*cfg.tasks, *cfg.general]
    assert {task.path for task in sets} == {f"example:{path.name}" for path in FOLDER.glob("*.jsonl")}
    for task in sets:
        found = load_examples(task, seed=0)
        assert len(found.train) + len(found.test) == 500
    word = load_examples(cfg.tasks[0], seed=0).test[0]
    assert word["answer"] == "".join(letter for letter in word["prompt"].split()[1] if letter in "aeiou")


def test_the_probe_of_the_words_learns_its_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a newcomer runs first says nothing of masks that show nothing."""
    cfg = run_config(parse(["run", "--config", "example:words"])["run"])
    monkeypatch.chdir(tmp_path)
    run_probe(cfg)
    assert cfg.folder.specificity.is_file()
    assert "has not learned" not in caplog.text


def test_other_paths_are_themselves() -> None:
    assert example_config("runs/example:words") == "runs/example:words"
    assert example_file("~/a.jsonl", "path") == Path.home() / "a.jsonl"


def test_what_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", "example:nothing"]) == 2
    error = capsys.readouterr().err
    assert (
        "config='example:nothing': there is no such example; choose one of example:quickstart, example:words"
        in error
    )
    assert error.count("\n") == 1
    task = TaskConfig("t", "example:words.yaml")
    with pytest.raises(
        ValueError, match=r"^tasks\.t\.path='example:words\.yaml': .* choose one of example:back"
    ):
        load_examples(task, seed=0)


def test_the_version_is_stated_once() -> None:
    assert trace_dist.__version__ == version("trace-dist")
    assert "__version__ =" not in (ROOT / "trace_dist/__init__.py").read_text()
