"""One example in all the forms that people use: the same examples, the same token ids; what fits no form is one clear line."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
from data.conftest import TEMPLATE, char_tokenizer

from trace_dist.config import DataConfig, TaskConfig
from trace_dist.data import encode, load_examples, load_task
from trace_dist.data.columns import _say

PAIRS = [(f'Where, "{i}"?\nSay.', f"0{i} NA") for i in range(4)]
"""Prompts with what CSV must quote, answers that a reader could take for numbers or for nothing."""


def task(path: Path | str, **options: Any) -> TaskConfig:
    return TaskConfig(**{"name": "t", "path": str(path), **options})


def alpaca(asked: str, answer: str) -> dict[str, Any]:
    instruction, more = asked.split("\n")
    return {"instruction": instruction, "input": more, "output": answer}


def messages(asked: str, answer: str) -> dict[str, Any]:
    said = {"user": asked, "assistant": answer}
    parts = {
        role: [{"type": "text", "text": part} for part in (text[:2], text[2:])] for role, text in said.items()
    }
    return {"messages": [{"role": role, "content": content} for role, content in parts.items()]}


FORMS: dict[str, Any] = {
    "prompt/answer": lambda asked, answer: {"prompt": asked, "answer": answer, "id": 1},
    "prompt/completion": lambda asked, answer: {"prompt": asked, "completion": answer},
    "question/answer": lambda asked, answer: {"question": asked, "answer": answer},
    "problem/solution": lambda asked, answer: {"problem": asked, "solution": answer},
    "alpaca": alpaca,
    "alpaca without input": lambda asked, answer: {"instruction": asked, "input": None, "output": answer},
    "messages": messages,
    "sharegpt": lambda asked, answer: {
        "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    },
    "turns and completion": lambda asked, answer: {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": answer}],
    },
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The same rows as any kind of file; cells of CSV files hold JSON where they are no text."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(rows[0])
            for row in rows:
                cells = [cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()]
                writer.writerow("" if cell == "null" else cell for cell in cells)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def token_ids(path: Path, template: str | None) -> list[list[int]]:
    """Encoded training examples, in an order that does not depend on how they are stored."""
    loaded = load_task(task(path), seed=0)
    encoded = encode(loaded.train, char_tokenizer(template), DataConfig())
    return sorted(row["input_ids"] + row["labels"] for row in encoded)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_one_example_has_the_same_token_ids_in_every_form_and_kind_of_file(
    suffix: str, tmp_path: Path
) -> None:
    found = {}
    for number, (name, form) in enumerate(FORMS.items()):
        if name == "turns and completion" and suffix in (".csv", ".tsv"):
            continue  # a prompt in a cell is a text, whatever it looks like
        rows = [form(*pair) for pair in PAIRS]
        path = write(tmp_path / f"{number}{suffix}", rows[:3])
        write(path.with_suffix(f".test{suffix}"), rows[3:])
        found[name] = token_ids(path, TEMPLATE)
    wanted = encode(
        datasets.Dataset.from_list([{"prompt": asked, "answer": answer} for asked, answer in PAIRS[:3]]),
        char_tokenizer(TEMPLATE),
        DataConfig(),
    )
    expected = sorted(row["input_ids"] + row["labels"] for row in wanted)
    assert {name for name, ids in found.items() if ids != expected} == set()


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_a_number_is_what_it_is_printed_as(kind: str, tmp_path: Path) -> None:
    """However many bits a parquet file gives it."""
    table = pandas.DataFrame({"question": ["a", "b"], "answer": [0.1, 2.5]}).astype({"answer": kind})
    for name in ("d.parquet", "d.test.parquet"):
        table.to_parquet(tmp_path / name)
    found = load_examples(task(tmp_path / "d.parquet"), seed=0).test
    assert sorted(row["answer"] for row in found) == ["0.1", "2.5"]
    table["answer"] = table["answer"].where(table["question"] == "a")
    table.to_parquet(tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"column 'answer': NaN, where a value is missing|None is neither"):
        load_examples(task(tmp_path / "d.parquet"), seed=0)


def test_lists_in_cells_as_pandas_writes_them(tmp_path: Path) -> None:
    """``to_csv`` of a column of lists writes Python."""
    for name in ("messages", "sharegpt"):
        rows = [FORMS[name](*pair) for pair in PAIRS]
        for path, some in ((tmp_path / "d.csv", rows[:3]), (tmp_path / "d.test.csv", rows[3:])):
            pandas.DataFrame(some).to_csv(path, index=False)
        lines = write(tmp_path / "d.jsonl", rows[:3])
        write(tmp_path / "d.test.jsonl", rows[3:])
        assert token_ids(tmp_path / "d.csv", TEMPLATE) == token_ids(lines, TEMPLATE)
    quiz = pandas.DataFrame([{"question": "Which?", "choices": ["it's", 'a "b"'], "answer": 1}] * 2)
    for name in ("q.csv", "q.test.csv"):
        quiz.to_csv(tmp_path / name, index=False)
    (found,) = load_examples(task(tmp_path / "q.csv", num_test=1), seed=0).test
    assert found == {"prompt": 'Which?\nA. it\'s\nB. a "b"\nAnswer:', "answer": "B"}


@pytest.mark.parametrize("layout", ["hub", "hub of csv", "trace", "saved"])
@pytest.mark.parametrize("name", ["alpaca", "messages", "sharegpt"])
def test_a_folder_gives_the_token_ids_of_a_file(name: str, layout: str, tmp_path: Path) -> None:
    """Folders as on the hub, of the TRACE benchmark and of save_to_disk, beside JSON Lines of prompts and answers."""
    rows = [FORMS[name](*pair) for pair in PAIRS]
    folder = tmp_path / "folder"
    (folder / ("data" if layout == "hub" else "")).mkdir(parents=True)
    splits = {"train": rows[:3], "test": rows[3:]}
    for split, some in splits.items():
        if layout == "hub":
            write(folder / f"data/{split}-00000-of-00001.parquet", some)
        elif layout == "hub of csv":
            write(folder / f"{split}.csv", some)
        elif layout == "trace":
            write(folder / f"{split}.json", some)
    if layout == "saved":
        datasets.DatasetDict(
            {split: datasets.Dataset.from_list(some) for split, some in splits.items()}
        ).save_to_disk(folder)
    plain = [{"prompt": asked, "answer": answer} for asked, answer in PAIRS]
    path = write(tmp_path / "plain.jsonl", plain[:3])
    write(tmp_path / "plain.test.jsonl", plain[3:])
    assert token_ids(folder, TEMPLATE) == token_ids(path, TEMPLATE)


def examples(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """Rows as examples; the last one is also the test set."""
    path = write(tmp_path / "d.jsonl", list(rows))
    write(tmp_path / "d.test.jsonl", [rows[-1]])
    return load_examples(task(path, **options), seed=0).test


def test_a_choice_is_a_letter_however_it_is_given(tmp_path: Path) -> None:
    choices = ["red", "blue", "4"]
    listed = "Which?\nA. red\nB. blue\nC. 4\nAnswer:"
    arc = {"text": choices, "label": ["1", "2", "3"]}
    for options, key, letter in (
        (choices, 1, "B"),
        (choices, "1", "B"),
        (choices, "b", "B"),
        (choices, "blue", "B"),
        (choices, "4", "C"),
        (json.dumps(choices), "C", "C"),
        (arc, "3", "C"),
    ):
        row = {"question": "Which?", "choices": options, "answer": key}
        assert examples(tmp_path, row) == [{"prompt": listed, "answer": letter}]
    row = {"question": "Which?", "choices": arc, "answerKey": "2"}
    assert examples(tmp_path, row) == [{"prompt": listed, "answer": "B"}]
    named = {"question": "Which?", "choices": choices, "label": 0}
    assert examples(tmp_path, named, answer_field="label") == [{"prompt": listed, "answer": "A"}]


@pytest.mark.parametrize(
    ("choices", "key", "message"),
    [
        (["a", "b"], 2, "the right choice 2 is neither a letter"),
        (["a", "b"], "-1", "the right choice '-1' is neither"),
        (["1", "2"], "1", "the right choice '1' fits several of"),
        (["B", "A"], "A", "fits several of"),
        (["a"], 0, "no list of 2 to 26 choices"),
        ("a, b", 0, "no JSON list of choices"),
        ({"text": ["a", "b"], "label": ["x"]}, "x", "2 texts have 1 labels"),
        (["a", None], 0, "None is neither a string nor a number"),
    ],
)
def test_a_choice_that_is_none_is_refused(choices: Any, key: Any, message: str, tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": choices, "answer": key}
    with pytest.raises(ValueError, match=rf"d\.jsonl: example 0.*{message}"):
        examples(tmp_path, row)


def test_several_references(tmp_path: Path) -> None:
    row = {"question": "q", "answer": ["a", "b", "a"]}
    expected = {"prompt": "q", "answer": "a", "references": ["a", "b"]}
    assert examples(tmp_path, row) == [expected]
    squad = {"question": "q", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}}
    assert examples(tmp_path, squad, answer_field="answers") == [expected]
    assert examples(tmp_path, {"question": "q", "answer": ["a"]}) == [{"prompt": "q", "answer": "a"}]
    with pytest.raises(ValueError, match="list of references is empty"):
        examples(tmp_path, {"question": "q", "answer": []})
    for name in ("d.jsonl", "d.test.jsonl"):
        write(tmp_path / name, [row, {"question": "r", "answer": "c"}])
    loaded = load_task(task(tmp_path / "d.jsonl"), seed=0)
    assert sorted(map(tuple, loaded.test["references"][:])) == [("a", "b"), ("c",)]
    assert loaded.majority_percent == 50


def test_templates(tmp_path: Path) -> None:
    row = {"context": "c", "Question text": 3, "b": "{x}", "y": "z"}
    options = {"prompt_template": "{context}: {Question text}\n{{}}{b}", "answer_template": "<{y}>"}
    assert examples(tmp_path, row, **options) == [{"prompt": "c: 3\n{}{x}", "answer": "<z>"}]
    mixed = {"prompt_template": "{context}", "answer_field": "y"}
    assert examples(tmp_path, row, **mixed) == [{"prompt": "c", "answer": "z"}]
    assert examples(tmp_path, row | {"output": "o"}, prompt_template="{b}") == [
        {"prompt": "{x}", "answer": "o"}
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_template": "{question}"}, r"prompt_template names \{question\}, but the columns are \['left', 'right'\]"),
        ({"answer_template": "{a.b}", "prompt_field": "left"}, r"answer_template names \{a\.b\}"),
        ({"prompt_template": "{left}"}, r"no column 'answer', it has \['left', 'right'\].*answer_field"),
        ({"prompt_field": "left", "answer_field": "rihgt"}, r"no column 'rihgt', it has .*set tasks\.t\.answer_field"),
        ({"messages_field": "turns"}, r"no column 'turns', it has .*set tasks\.t\.messages_field"),
        ({"answer_field": "right"}, r"no column 'prompt', it has .*prompt_field"),
        ({}, r"no column 'prompt', it has \['left', 'right'\]; columns that were tried: prompt/answer, .*conversations"),
    ],
)  # fmt: skip
def test_a_column_that_is_not_there_is_named_with_those_that_are(
    options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        examples(tmp_path, {"left": "a", "right": "b"}, **options)
    assert "\n" not in str(error.value)


def test_several_forms_are_refused_until_one_is_chosen(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer": "a", "completion": "c", "messages": messages("m", "n")["messages"]}
    with pytest.raises(
        ValueError, match="hold several forms of an example, messages and prompt/answer and prompt/compl"
    ):
        examples(tmp_path, row)
    assert examples(tmp_path, row, messages_field="messages") == [{"prompt": "m", "answer": "n"}]
    chosen = {"prompt_field": "prompt", "answer_field": "completion"}
    assert examples(tmp_path, row, **chosen) == [{"prompt": "p", "answer": "c"}]
    # The text of Alpaca repeats the others, and no pair is hidden by it.
    row = {"instruction": "i", "input": "", "output": "o", "text": "### i o"}
    assert examples(tmp_path, row) == [{"prompt": "i", "answer": "o"}]


def test_what_is_read_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _say.cache_clear()
    caplog.set_level(logging.INFO, logger="trace_dist")
    rows = [{"question": "q", "answer": "a", "id": 1}] * 2
    examples(tmp_path, *rows)
    examples(tmp_path, *rows)
    # A record may be captured by two loggers.
    records = {id(record): record.getMessage() for record in caplog.records}
    lines = [line for line in records.values() if "reads the columns" in line]
    assert lines == ["tasks.t: reads the columns question, answer; not id"]
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
    examples(tmp_path, {"question": "q", "answer": "a", "passage": "p"})
    assert (
        "the column passage is not read; where the question needs it, write a prompt_template" in caplog.text
    )


def test_a_column_that_a_later_example_lacks_is_named_with_it(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": "a"}, {"prompt": "q"}]
    with pytest.raises(ValueError, match=r"example 1 has no column 'answer', it has \['prompt'\]"):
        examples(tmp_path, *rows)


def test_answers_that_are_missing_are_not_learned_unsaid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A CSV file has empty cells for them; pandas writes NaN, and withheld test answers are all empty."""
    (tmp_path / "d.csv").write_text(
        "prompt,answer\n" + "".join(f"q{i},{'a' * (i % 4 > 0)}\n" for i in range(40))
    )
    (tmp_path / "d.test.csv").write_text("prompt,answer\nt,a\n")
    load_examples(task(tmp_path / "d.csv"), seed=0)
    assert f"tasks.t: 10 of 40 answers of {tmp_path}/d.csv are empty" in caplog.text
    (tmp_path / "d.test.csv").write_text("prompt,answer\nt,\nu,\n")
    with pytest.raises(ValueError, match=r"d\.test\.csv: all 2 answers are empty; name another column"):
        load_examples(task(tmp_path / "d.csv"), seed=0)
    with pytest.raises(ValueError, match="example 1, column 'answer': NaN, where a value is missing"):
        examples(tmp_path, {"prompt": "p", "answer": 1.5}, {"prompt": "q", "answer": float("nan")})


def test_running_text_begins_with_its_prompt(tmp_path: Path) -> None:
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    (tmp_path / "d.txt").write_text("a b\n\nword\n你好世界\n", encoding="utf-8-sig")
    (tmp_path / "d.test.txt").write_text(f"{text}\n")
    loaded = load_examples(task(tmp_path / "d.txt"), seed=0)
    (row,) = loaded.test
    assert row == {"prompt": text[: text.index(" nine")], "answer": text[text.index(" nine") :]}
    assert sorted(row["prompt"] + "|" + row["answer"] for row in loaded.train) == [
        "a| b",
        "wo|rd",
        "你好|世界",
    ]
