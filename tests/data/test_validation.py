"""Which examples are validated on: of a split, of a file, or held out; never tested ones, and no prompt on two sides."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
from data.test_sources import SUM, examples, task, write_jsonl

from trace_dist.config import ModelConfig, RunConfig, TaskConfig
from trace_dist.data import load_examples, load_task
from trace_dist.data.examples import Example
from trace_dist.data.validation import by_hash, hold_out

ALL = {"num_train": 10**6, "num_test": 10**6}


def load(cfg: TaskConfig, seed: int = 0) -> Any:
    return load_examples(cfg, seed, validate=True)


def prompts(rows: list[Example]) -> set[str]:
    return {row["prompt"] for row in rows}


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_without_validation_nothing_is_held_out(tmp_path: Path) -> None:
    cfg = task(path=write_jsonl(tmp_path / "d.jsonl", examples(400)), **ALL)
    assert load_examples(cfg, 0).validation == []
    assert load_task(cfg, 0).validation is None


def test_held_out_examples_are_neither_trained_nor_tested(tmp_path: Path) -> None:
    cfg = task(path=write_jsonl(tmp_path / "d.jsonl", examples(400)), num_validation=50, **ALL)
    plain, found = load_examples(cfg, 0), load(cfg)
    assert found.test == plain.test
    assert len(found.validation) == 50
    assert len(found.train) + 50 == len(plain.train)
    assert prompts(found.train) | prompts(found.validation) == prompts(plain.train)
    assert not prompts(found.validation) & (prompts(found.train) | prompts(found.test))
    assert load_task(cfg, 0, validate=True).validation["prompt"][:] == [
        row["prompt"] for row in found.validation
    ]


def test_what_is_held_out_depends_neither_on_the_order_nor_on_the_seed(tmp_path: Path) -> None:
    rows = examples(400)
    write(tmp_path / "one.jsonl", rows)
    random.Random(1).shuffle(rows)
    write(tmp_path / "other.jsonl", rows)
    one = load(task(path=str(tmp_path / "one.jsonl"), **ALL))
    other = load(task(path=str(tmp_path / "other.jsonl"), **ALL), seed=7)
    assert one.validation == other.validation


def test_examples_of_one_prompt_stay_together() -> None:
    rows = [{"prompt": f"p{i % 10}", "answer": str(i)} for i in range(100)]
    stays, held = hold_out(rows, 25, ())
    assert len(held) == 20  # a fifth; the third prompt would be too much
    assert not prompts(stays) & prompts(held)
    assert len(stays) + len(held) == 100
    # a prompt with too many examples is passed over, and the smallest is taken where none fits
    rows = [{"prompt": "big", "answer": str(i)} for i in range(60)] + [
        {"prompt": "s", "answer": str(i)} for i in range(40)
    ]
    assert prompts(hold_out(rows, 5, ())[1]) == {"s"}
    assert by_hash([], 5) == []


def test_no_more_than_a_fifth_is_held_out_and_at_least_one() -> None:
    assert [len(hold_out(examples(num), 200, ())[1]) for num in (2, 9, 20, 2000)] == [1, 1, 4, 200]


def test_a_named_split_is_validated_on_and_training_stays_as_it_is(tmp_path: Path) -> None:
    data = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(examples(60)),
            "test": datasets.Dataset.from_list(examples(20, "t")),
            "dev": datasets.Dataset.from_list([*examples(30, "v"), *examples(5), *examples(5, "t")]),
        }
    )
    data.save_to_disk(str(tmp_path / "saved"))
    cfg = task(path=str(tmp_path / "saved"), num_validation=25)
    found = load(cfg)
    # known by its name
    assert found == load(task(path=str(tmp_path / "saved"), num_validation=25, validation_split="dev"))
    assert (found.train, found.test) == (load_examples(cfg, 0).train, load_examples(cfg, 0).test)
    assert len(found.validation) == 25
    assert prompts(found.validation) <= prompts(examples(30, "v"))
    part = load(task(path=str(tmp_path / "saved"), split="train[:90%]", validation_split="train[90%:]"))
    assert prompts(part.validation) == {f"q{i}" for i in range(54, 60)}
    assert len(part.train) == 54


def test_a_split_that_is_named_for_validation_is_not_tested(tmp_path: Path) -> None:
    """Without a test split it would be, so a part of the training split is tested instead."""
    for split, rows in (("train", examples(300)), ("validation", examples(40, "v"))):
        (tmp_path / "d").mkdir(exist_ok=True)
        write(tmp_path / "d" / f"{split}.jsonl", rows)
    assert prompts(load(task(path=str(tmp_path / "d"))).test) <= prompts(examples(40, "v"))
    found = load(task(path=str(tmp_path / "d"), validation_split="validation"))
    assert found.validation
    assert prompts(found.validation) <= prompts(examples(40, "v"))
    assert prompts(found.test) <= prompts(examples(300))


def test_a_file_is_validated_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"q": f"q{i}", "a": "x"} for i in range(100)])
    write(tmp_path / "more.jsonl", [{"q": f"v{i}", "a": "y"} for i in range(9)])
    columns = {"prompt_field": "q", "answer_field": "a"}
    named = load(task(path=path, validation_path=str(tmp_path / "more.jsonl"), **columns))
    assert prompts(named.validation) == {f"v{i}" for i in range(9)}
    assert load(task(path=path, **columns)).validation[0]["answer"] == "x"
    # the one beside it is found by its name
    (tmp_path / "more.jsonl").rename(tmp_path / "d.validation.jsonl")
    assert load(task(path=path, **columns)) == named
    assert load(task(reasoning_gym=SUM | {"max_digits": 3}, num_train=50, num_test=5)).validation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_split": "dev"}, r"no split 'dev', it has \['train'\].*tasks.t.validation_split"),
        (
            {"validation_path": "none.jsonl"},
            "tasks.t.validation_path='none.jsonl': no such file; fix the path",
        ),
        (
            {"validation_split": "train"},
            "none of its 100 validation examples has a prompt that is neither trained nor tested",
        ),
    ],
)
def test_validation_examples_that_are_not_there(
    options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(task(path=write_jsonl(tmp_path / "d.jsonl", examples(100)), **options))


def test_a_task_of_one_prompt_has_none_to_spare(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": str(i)} for i in range(30)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    write(tmp_path / "d.test.jsonl", examples(10))
    with pytest.raises(
        ValueError, match=r"tasks\.t: no prompt can be held out to validate on, all 30 training examples"
    ):
        load(task(path=path))


def test_fields_that_say_the_same_or_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="validation_path='b': validation_split is set too"):
        task(path="a", validation_split="dev", validation_path="b")
    with pytest.raises(ValueError, match="validation_split='dev': says how a path is read"):
        task(reasoning_gym=SUM, validation_split="dev")
    with pytest.raises(ValueError, match="num_validation=0: must be at least 1"):
        task(path="a", num_validation=0)
    general = [TaskConfig("g", path="a", validation_path="b")]
    with pytest.raises(ValueError, match=r"general\.g\.validation_path='b': general sets are not trained"):
        RunConfig(target=ModelConfig("m"), tasks=[task(path="a")], run_dir="r", general=general)
