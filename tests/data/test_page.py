"""docs/data.md and configs/trace-benchmark.yaml are true: their examples are read, their metrics are all there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from trace_dist.cli.parser import parse, run_config
from trace_dist.config import ModelConfig, RunConfig, TaskConfig, TrainConfig
from trace_dist.data import Task, load_examples, load_task
from trace_dist.evaluation.metric import check_metric, load_metric
from trace_dist.parts import METRICS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/data.md").read_text()
ROWS = [{"prompt": f"Is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(40)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    for name in ("d.jsonl", "d.test.jsonl"):
        write(folder / name, json.dumps(row))
    return load_examples(TaskConfig(name="t", path=str(folder / "d.jsonl")), seed=0).test


def test_the_forms_of_the_page(tmp_path: Path) -> None:
    same, choice = ([json.loads(line) for line in block.splitlines()] for block in blocks("json"))
    expected = {"prompt": "Where is Rome?", "answer": "Italy"}
    assert [read(row, tmp_path) for row in same] == [[expected]] * 7
    (listed,) = blocks("text")
    assert [read(row, tmp_path) for row in choice] == [[{"prompt": listed.strip(), "answer": "B"}]]
    (references,) = re.findall(r'`(\{"question".*?\})`', PAGE)
    assert read(json.loads(references), tmp_path) == [expected | {"references": ["Italy", "in Italy"]}]


def test_the_sources_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each path is made as its row of the table says; the hub is read in test_reading.py."""
    monkeypatch.chdir(tmp_path)
    page = yaml.safe_load(blocks("yaml")[0])
    tasks = [TaskConfig(**values) for values in (*page["tasks"], *page["general"])]
    data = datasets.Dataset.from_list(ROWS)
    write(tmp_path / "data/copy.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    write(
        tmp_path / "data/alpaca.json",
        json.dumps([{"instruction": row["prompt"], "output": row["answer"]} for row in ROWS]),
    )
    write(
        tmp_path / "data/quiz.csv",
        "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in ROWS),
    )
    write(tmp_path / "data/notes.txt", "".join(f"{row['prompt']} {row['answer']}\n" for row in ROWS))
    data.to_parquet("data/facts.parquet")
    (tmp_path / "data/folder/data").mkdir(parents=True)
    data.to_parquet("data/folder/data/train-00000-of-00001.parquet")
    for split in ("train", "eval", "test"):
        write(tmp_path / f"data/C-STANCE/{split}.json", json.dumps(ROWS))
    data.save_to_disk("data/saved")
    for task in tasks:
        if task.name != "grades":
            loaded = load_examples(task, seed=0)
            assert len(loaded.train) + len(loaded.test) >= 40


def test_the_templates_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reading, labels = (TaskConfig(**values) for values in yaml.safe_load(blocks("yaml")[1])["tasks"])
    for name in ("reading.jsonl", "reading.test.jsonl"):
        row = {"context": "Rome is in Italy.", "query": "Where?", "answers": {"text": ["Italy"]}}
        write(tmp_path / "data" / name, json.dumps(row))
    assert load_examples(reading, seed=0).test == [{"prompt": "Rome is in Italy.\nWhere?", "answer": "Italy"}]
    rows = [{"sentence": f"s{i}", "label": i % 2} for i in range(40)]
    write(tmp_path / "data/labels.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert load_task(labels, seed=0).choices == ["label: 0", "label: 1"]


def test_the_validation_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its example is a configuration, each of its options is there, and each task has its examples from where the page says."""
    monkeypatch.chdir(tmp_path)
    page = yaml.safe_load(blocks("yaml")[2])
    tasks = [TaskConfig(**values) for values in page["tasks"]]
    cfg = RunConfig(ModelConfig("m"), tasks, run_dir="r", train=TrainConfig(**page["train"]))
    table = PAGE.partition("## Validation")[2].partition("##")[0]
    for section, key in re.findall(r"`(train|tasks)\.(\w+)`", table):
        assert hasattr(cfg.train if section == "train" else tasks[0], key)
    csv = "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in ROWS)
    write(tmp_path / "data/quiz.csv", csv)
    for split, rows in (("train", ROWS), ("test", ROWS[:5]), ("eval", [{"prompt": "eval", "answer": "yes"}])):
        write(tmp_path / f"data/C-STANCE/{split}.json", json.dumps(rows))
    for name, rows in (("copy", ROWS), ("copy-held-out", [{"prompt": "apart", "answer": "no"}])):
        write(tmp_path / f"data/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    quiz, trace, copy = (load_examples(task, seed=0, validate=True) for task in tasks)
    assert len(quiz.validation) == (len(quiz.validation) + len(quiz.train)) // 5
    assert [row["prompt"] for row in trace.validation] == ["eval"]
    assert [row["prompt"] for row in copy.validation] == ["apart"]


def test_the_metrics_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = PAGE.partition("## Metrics")[2]
    rows = [line.partition("|")[2].partition("|")[0] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"metric"} == set(METRICS)
    for name, module in ((name, METRICS.load(name)) for name in METRICS):
        assert module.label
        assert hasattr(module, "requires") == (
            name in re.findall(r"`(\w+)`", table.partition("need `pip")[0].splitlines()[-1])
        )
    (function,) = blocks("python")
    write(tmp_path / "my_pkg.py", function)
    monkeypatch.syspath_prepend(tmp_path)
    row = datasets.Dataset.from_list([{"prompt": "p", "answer": "A"}])
    task = Task("t", row, row, None, "my_pkg.my_metric", 0.0, 0.0)
    check_metric(task)
    compare = load_metric(task).compare
    assert compare is not None
    assert compare("a", ["B", "A"], "p") == 1


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The configuration of the TRACE benchmark, in a folder with tiny data of its layout."""
    cfg = run_config(parse(["run", "--config", str(ROOT / "configs/trace-benchmark.yaml")])["run"])
    monkeypatch.chdir(tmp_path)
    for task in cfg.tasks:
        for split, start in (("train", 0), ("eval", 20), ("test", 30)):
            rows = [
                {"prompt": row["prompt"], "answer": f"{row['answer']}, {i}"} for i, row in enumerate(ROWS)
            ]
            write(Path(str(task.path)) / f"{split}.json", json.dumps(rows[start : start + 10]))
    return cfg


def test_the_trace_benchmark_loads_with_the_right_metric_of_each_task(benchmark: RunConfig) -> None:
    assert [(task.name, task.metric) for task in benchmark.tasks] == [
        ("C-STANCE", "exact_match"),
        ("FOMC", "exact_match"),
        ("MeetingBank", "rouge_l"),
        ("Py150", "edit_similarity"),
        ("ScienceQA", "exact_match"),
        ("NumGLUE-cm", "exact_match"),
        ("NumGLUE-ds", "exact_match"),
        ("20Minuten", "sari"),
    ]
    epochs = (5, 3, 7, 5, 3, 5, 5, 7)
    for cfg, number in zip(benchmark.tasks, epochs, strict=True):
        assert cfg.steps == number * 5000 // benchmark.train.batch_size
        task = load_task(cfg, seed=0)
        assert (len(task.train), len(task.test)) == (10, 10)
        check_metric(task)
    science = load_metric(load_task(benchmark.tasks[4], seed=0)).compare
    assert science is not None
    assert science("B: since", ["B, for"], "") == 1
