"""Sources of all kinds give the same examples; what cannot be read is one line that names field, place and cure."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.arrow_writer import ArrowWriter

from trace_dist.config import TaskConfig
from trace_dist.data import load_examples

ROWS = [{"prompt": f"q{i}", "answer": f"0{i}"} for i in range(40)]


def task(path: Path | str, **options: Any) -> TaskConfig:
    return TaskConfig(**{"name": "t", "path": str(path), "num_train": 999, "num_test": 999, **options})


def prompts(cfg: TaskConfig) -> tuple[set[str], set[str]]:
    """What is trained and what is tested."""
    loaded = load_examples(cfg, seed=0)
    assert all(row["answer"] == f"0{row['prompt'][1:]}" for row in (*loaded.train, *loaded.test))
    return {row["prompt"] for row in loaded.train}, {row["prompt"] for row in loaded.test}


def some(start: int, stop: int) -> set[str]:
    return {f"q{i}" for i in range(start, stop)}


def listed(names: set[str]) -> list[dict[str, str]]:
    return [{"prompt": name, "answer": f"0{name[1:]}"} for name in sorted(names)]


def write(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_list(rows)
    if path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix == ".arrow":
        with ArrowWriter(path=str(path)) as writer:
            writer.write_table(data.data.table)
            writer.finalize()
    elif path.suffix == ".csv":
        path.write_text(
            "".join(
                f"{row['prompt']},{row['answer']}\n"
                for row in [{"prompt": "prompt", "answer": "answer"}, *rows]
            )
        )
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_alone_is_split_by_hash_alike(suffix: str, tmp_path: Path) -> None:
    found = prompts(task(write(tmp_path / f"d{suffix}")))
    assert found == prompts(task(write(tmp_path / "lines.jsonl")))
    assert found[0] | found[1] == some(0, 40)
    assert found[0].isdisjoint(found[1])
    write(tmp_path / f"d.test{suffix}", ROWS[:5])
    assert prompts(task(tmp_path / f"d{suffix}")) == (some(5, 40), some(0, 5))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_files_that_gzip_has_packed_are_read_as_they_were(suffix: str, tmp_path: Path) -> None:
    def packed(name: str, rows: list[dict[str, str]]) -> Path:
        plain = write(tmp_path / "plain" / f"{name}{suffix}", rows)
        out = tmp_path / "packed" / f"{plain.name}.GZ"
        out.parent.mkdir(exist_ok=True)
        out.write_bytes(gzip.compress(plain.read_bytes()))
        return out

    path = packed("d", ROWS)
    assert prompts(task(path)) == prompts(task(write(tmp_path / "lines.jsonl")))
    packed("d.test", ROWS[:5])
    assert prompts(task(path)) == (some(5, 40), some(0, 5))
    # Texts that look like dates stay as they stand, in a folder as on the hub too.
    days = [{"prompt": f"q{i}", "answer": f"2021-05-0{i + 1}"} for i in range(6)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        packed(split, days).rename(folder / f"{split}{suffix}.gz")
    loaded = load_examples(task(folder), seed=0)
    assert {row["answer"] for row in (*loaded.train, *loaded.test)} == {row["answer"] for row in days}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"d\.\w+\.GZ: cannot be unpacked .*; pack the file again"):
        load_examples(task(path), seed=0)


def test_tables_as_other_programs_write_them(tmp_path: Path) -> None:
    """pandas writes an index without a name; spreadsheets separate by semicolons where a comma is in numbers."""
    table, lines = tmp_path / "d.csv", [f"{row['prompt']},{row['answer']}" for row in ROWS]
    table.write_text(
        "".join(f"{place - 1},{line}\n" for place, line in enumerate(["prompt,answer", *lines]))[2:]
    )
    assert prompts(task(table)) == prompts(task(write(tmp_path / "lines.jsonl")))
    for text, words in (
        (
            "prompt;answer\nq;a\n",
            "d.csv:1: the header is the one cell 'prompt;answer'; separate cells by ',', not ';'",
        ),
        ("prompt,answer\n\n", "d.csv:1: there is no row below the header"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_examples(task(table), seed=0)


def test_json_lines_in_a_file_that_is_called_json(tmp_path: Path) -> None:
    write(tmp_path / "lines.jsonl").rename(tmp_path / "d.json")
    trained, tested = prompts(task(tmp_path / "d.json"))
    assert trained | tested == some(0, 40)
    for name in ("d.JSONL", "d.ndjson"):
        write(tmp_path / "lines.jsonl").rename(tmp_path / name)
        assert prompts(task(tmp_path / name)) == (trained, tested)


@pytest.mark.parametrize(
    "files",
    [
        {
            "data/train-00000-of-00002.parquet": (0, 15),
            "data/train-00001-of-00002.parquet": (15, 30),
            "data/test-00000-of-00001.parquet": (30, 40),
        },
        {"train.csv": (0, 30), "test.csv": (30, 40)},
        {"train.jsonl": (0, 30), "test.jsonl": (30, 40)},
        {"train/part.jsonl": (0, 30), "test/part.jsonl": (30, 40)},
        {"train.json": (0, 30), "eval.json": (5, 10), "test.json": (30, 40)},
        {"train.parquet": (0, 30), "validation.parquet": (30, 40)},
    ],
    ids=lambda files: next(iter(files)).split("-")[0],
)  # fmt: skip
def test_folders(files: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    for name, (start, stop) in files.items():
        write(tmp_path / "d" / name, ROWS[start:stop])
    assert prompts(task(tmp_path / "d")) == (some(0, 30), some(30, 40))


def test_parquet_files_without_rows(tmp_path: Path) -> None:
    """As programs leave them that write in parallel; ``datasets`` would end with "BatchSize must be greater than 0"."""
    kind = pa.schema({"prompt": pa.string(), "answer": pa.string()})
    (tmp_path / "d").mkdir()
    pq.write_table(kind.empty_table(), tmp_path / "d" / "train-00000.parquet")
    for name, (start, stop) in {"train-00001": (0, 30), "test-00000": (30, 40)}.items():
        write(tmp_path / "d" / f"{name}.parquet", ROWS[start:stop])
    assert prompts(task(tmp_path / "d")) == (some(0, 30), some(30, 40))
    with pytest.raises(
        ValueError, match=r"^tasks\.t\.path=.*train-00000.parquet holds no rows; give it examples$"
    ):
        prompts(task(tmp_path / "d" / "train-00000.parquet"))


@pytest.mark.parametrize("names", [("quiz.jsonl", "quiz.test.jsonl"), ("support.csv", "dev-ops.csv")])
def test_a_folder_of_which_only_some_files_are_of_a_split(names: tuple[str, str], tmp_path: Path) -> None:
    """`datasets` reads those alone, and what is to be tested would be trained."""
    files = [
        write(tmp_path / "d" / name, rows) for name, rows in zip(names, (ROWS[:10], ROWS[10:]), strict=True)
    ]
    with pytest.raises(
        ValueError,
        match=rf"^tasks\.t\.path=.*: {names[0]} is of no split, beside those of \w+ by their names; put",
    ) as error:
        load_examples(task(tmp_path / "d"), seed=0)
    assert "\n" not in str(error.value)
    # Hidden files, others of another kind, and whose card says so are none of it.
    files[0].rename(tmp_path / "d" / f".{names[0]}")
    (tmp_path / "d" / "notes.md").write_text("x")
    assert set.union(*prompts(task(tmp_path / "d"))) == some(10, 40)
    (tmp_path / "d" / f".{names[0]}").rename(files[0])
    card = json.dumps([{"config_name": "one", "data_files": [{"split": "test", "path": names[1]}]}])
    (tmp_path / "d" / "README.md").write_text(f"---\nconfigs: {card}\n---\n")
    assert set.union(*prompts(task(tmp_path / "d"))) == some(10, 40)
    (tmp_path / "d" / "README.md").unlink()
    files[0].rename(tmp_path / "d" / f"train-{names[0]}")
    assert prompts(task(tmp_path / "d")) == (some(0, 10), some(10, 40))


@pytest.mark.parametrize("split", [None, "test"])
def test_files_that_are_left_out_are_named(
    split: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a folder that says what is trained, or whose user does."""
    write(tmp_path / "d" / ("train.jsonl" if split is None else "test.jsonl"), ROWS[:20])
    write(tmp_path / "d" / "more.jsonl", ROWS[20:])
    (tmp_path / "d" / "notes.md").write_text("x")
    for _ in range(2):
        assert set.union(*prompts(task(tmp_path / "d", split=split))) == some(0, 20)
    said = [each.getMessage() for each in caplog.records if "left out" in each.getMessage()]
    assert len(said) == 1
    assert "left out 1 of its files (more.jsonl), whose names say no split; put train into" in said[0]


def test_a_folder_with_a_card_that_names_subsets_and_their_files(tmp_path: Path) -> None:
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*.parquet"}]}
        for name in ("one", "two")
    ]
    write(tmp_path / "one/x.parquet", ROWS[:20])
    write(tmp_path / "two/x.parquet", ROWS[20:])
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert set.union(*prompts(task(tmp_path, subset="two"))) == some(20, 40)
    for options, named in (({}, "one"), ({"subset": "three"}, "three")):
        with pytest.raises(ValueError, match=rf"tasks\.t\.path=.*{named}"):
            load_examples(task(tmp_path, **options), seed=0)


def test_splits_by_name_and_by_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "d"
    splits = {"train": ROWS[:20], "test": ROWS[20:30], "train_sft": ROWS[30:]}
    for saved in (False, True):
        if saved:
            shutil.rmtree(folder)
            parts = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
            datasets.DatasetDict(parts).save_to_disk(str(folder))
        else:
            for name, rows in splits.items():
                write(folder / "data" / f"{name}-00000-of-00001.parquet", rows)
        assert prompts(task(folder)) == (some(0, 20), some(20, 30))
        assert prompts(task(folder, split="train_sft")) == (some(30, 40), some(20, 30))
        assert prompts(task(folder, test_split="train_sft")) == (some(0, 20), some(30, 40))
        parted = task(folder, split="train[:75%]", test_split="train[15:]")
        assert prompts(parted) == (some(0, 15), some(15, 20))
        for key in ("split", "test_split"):
            for name in ("trian", "train[", "train+test", "train[:x]"):
                with pytest.raises(
                    ValueError,
                    match=rf"no split .*, it has \['test', 'train', 'train_sft'\].*tasks\.t\.{key}",
                ):
                    load_examples(task(folder, **{key: name}), seed=0)


def test_only_one_split_or_one_for_validation(tmp_path: Path) -> None:
    """A hub folder with one split of any name is cut by hash; a validation split is tested where there is no other."""
    write(tmp_path / "one/test.parquet")
    trained, tested = prompts(task(tmp_path / "one"))
    assert trained | tested == some(0, 40)
    assert trained.isdisjoint(tested)
    for name in ("validation", "dev"):
        write(tmp_path / f"{name}/train.parquet", ROWS[:30])
        write(tmp_path / f"{name}/{name}.parquet", ROWS[30:])
        assert prompts(task(tmp_path / name)) == (some(0, 30), some(30, 40))
    datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"no split 'train', it has \['test'\]"):
        load_examples(task(tmp_path / "saved"), seed=0)
    (tmp_path / "trace").mkdir()
    write(tmp_path / "trace/train.json", ROWS[:30])
    write(tmp_path / "trace/eval.json", ROWS[30:])
    with pytest.raises(ValueError, match=r"no test\.json"):
        load_examples(task(tmp_path / "trace"), seed=0)
    assert prompts(task(tmp_path / "trace", test_split="validation")) == (some(0, 30), some(30, 40))


def test_class_labels_are_read_as_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        prompt=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    rows = [{"prompt": f"q{i}", "label": i % 2} for i in range(40)]
    folder = tmp_path / "d"
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(folder))
    loaded = load_examples(task(folder, answer_field="label"), seed=0)
    assert all(row["answer"] == ("yes" if int(row["prompt"][1:]) % 2 else "no") for row in loaded.train)
    hidden = datasets.Dataset.from_list([{"prompt": "q", "label": -1}], features=features)
    hidden.save_to_disk(str(tmp_path / "hidden"))
    with pytest.raises(ValueError, match="example 0, column 'label': None is neither"):
        load_examples(task(tmp_path / "hidden", answer_field="label"), seed=0)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_dataset_on_the_hub_is_read_by_its_id(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network `datasets` reads what it has cached of a hub dataset; the cache is filled from a folder."""
    for split, start, stop in (("train", 0, 30), ("test", 30, 40)):
        write(tmp_path / f"sums/{split}.parquet", ROWS[start:stop])
    (tmp_path / "sums/README.md").write_text("---\nconfigs: [{config_name: main}]\n---\n")
    datasets.load_dataset(str(tmp_path / "sums"), "main")
    (made,) = own_cache.glob("sums/*/*/*/dataset_info.json")
    shutil.copytree(made.parent, own_cache / "someone___sums/main/0.0.0" / ("a" * 40))
    offline(monkeypatch)
    assert prompts(task("someone/sums", subset="main")) == (some(0, 30), some(30, 40))
    with pytest.raises(ValueError, match=r"tasks\.t\.path='someone/sums'.*other"):
        load_examples(task("someone/sums", subset="other"), seed=0)


def test_an_unknown_id_and_a_path_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"tasks\.t\.path='data/copy': no such file or folder, and no dataset of the hub"
    ) as error:
        load_examples(task("data/copy"), seed=0)
    assert "\n" not in str(error.value)
    for path in ("data/copy.jsonl", "./data/copy", "copy", "a/b/c", "~/nothing"):
        with pytest.raises(ValueError, match=r"no such file or folder; fix the path"):
            load_examples(task(path), seed=0)
    write(tmp_path / "d.jsonl")
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    for options in ({"revision": "main"}, {"subset": "main"}):
        with pytest.raises(ValueError, match=r"has no meaning for 'saved'"):
            load_examples(task("saved", **options), seed=0)
        with pytest.raises(
            ValueError,
            match=r"tasks\.t\.(subset|revision)='main': has no meaning for .*leave it out",
        ):
            load_examples(task("d.jsonl", **options), seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "prompt,answer\na,b\nc,d,e\n", r"d\.csv:3: the row has 3 cells, the header 2"),
        ("d.csv", "prompt,answer\na,b\nc\n", r"d\.csv:3: the row has 1 cells"),
        ("d.csv", "", r"d\.csv:1: is empty; write a header and rows of examples"),
        ("d", "nothing", r"tasks\.t\.path=.*the files end in nothing; give files of one kind"),
        ("d.csv", "prompt,prompt\na,b\n", r"d\.csv:1: the header is \['prompt', 'prompt'\]; name each column once"),
        ("d.csv", 'prompt,answer\na,b\n"say "hi" to",b\n', r"d\.csv:3: a cell begins with a quote, and does not end with"),
        ("d.csv", 'prompt,answer\na,b\n"c,d\ne,f\n', r"d\.csv:3: a cell begins with a quote.*unexpected end of data"),
        ("d.tsv", 'prompt\tanswer\n"a" is\tb\n', r"d\.tsv:2: a cell .*write each quote inside as \"\""),
        ("d.csv", "prompt,answer\n", r"d\.csv:1: there is no row below the header; add examples"),
        ("d.csv", b"prompt,answer\ncaf\xe9,b\n", r"d\.csv:2: byte 0xe9 is not UTF-8"),
        ("d.tsv", "prompt\tanswer\na\n", r"d\.tsv:2: the row has 1 cells"),
        ("d.txt", b"caf\xe9 x\n", r"d\.txt:1: byte 0xe9 is not UTF-8"),
        ("d.parquet", "nothing", r"tasks\.t\.path=.*d\.parquet': cannot be read \(.*write the file again"),
        ("d.xlsx", "nothing", r"tasks\.t\.path=.*the files end in \.xlsx; give files of one kind out of \.jsonl"),
        ("d.jsonl", b'{"prompt": "a"}\n{"prompt": "\0"}\n' + b" " * 99, r"d\.jsonl:2: a zero byte"),
        ("d.jsonl", "{}".encode("utf-16-le"), r"d\.jsonl:1: this is UTF-16"),
        ("d.jsonl", gzip.compress(b"{}", mtime=0), r"d\.jsonl:1: this is compressed \(gzip\).*unpack"),
        ("d.csv", b"PK\x03\x04..", r"d\.csv:1: this is compressed \(zip\)"),
        ("d.jsonl", "", r"tasks\.t\.path=.*d\.jsonl': the train split is empty"),
        ("d.jsonl", '{"prompt": "a", "answer": "b", "prompt": "c"}\n', r"d\.jsonl:1: .*the key 'prompt' is there twice"),
        ("d.jsonl", '{"prompt": "a", "answer": NaN}\n', r"d\.jsonl: example 0, column 'answer': NaN, where a value is missing"),
        ("d.jsonl", '{"prompt": 1e999, "answer": "b"}\n', r"d\.jsonl: example 0, column 'prompt': inf is"),
        ("d.json", '{"prompt": "a"}', "holds a dict, not a list"),
        ("d.json", '{"prompt": "a"}\n{"prompt"}', r"d\.json:2: not valid JSON|d\.json: not valid JSON"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_examples(task(tmp_path / name), seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [{"notes.md": "x"}, {}, {"train.csv": "a,b\n1,2\n", "test.jsonl": "{}\n"}]
)
def test_a_folder_that_cannot_be_read(content: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name, text in content.items():
        (tmp_path / "d" / name).write_text(text)
    with pytest.raises(ValueError, match=r"tasks\.t\.path='.*/d'") as error:
        load_examples(task(tmp_path / "d"), seed=0)
    assert "\n" not in str(error.value)


def test_classes_and_short_floats_in_lists_are_read_as_alone(tmp_path: Path) -> None:
    text, label = datasets.Value("string"), datasets.ClassLabel(names=["no", "yes"])
    kinds = {"label": datasets.List(label), "size": {"text": datasets.List(datasets.Value("float32"))}}
    rows = [{"prompt": f"q{i}", "label": [i % 2], "size": {"text": [0.1, i]}} for i in range(40)]
    data = datasets.Dataset.from_list(rows, features=datasets.Features({"prompt": text, **kinds}))
    data.to_parquet(tmp_path / "d.parquet")
    labelled = load_examples(task(tmp_path / "d.parquet", answer_field="label"), seed=0).train
    assert all(row["answer"] == ("yes" if int(row["prompt"][1:]) % 2 else "no") for row in labelled)
    measured = load_examples(task(tmp_path / "d.parquet", answer_field="size"), seed=0).train
    assert all(row["references"] == ["0.1", f"{row['prompt'][1:]}.0"] for row in measured)


@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz", "d.parquet", "folder/d.arrow"])
def test_a_file_that_another_of_the_same_time_has_replaced(name: str, tmp_path: Path) -> None:
    """As ``cp -p``, ``rsync`` and ``tar`` leave it."""
    path = tmp_path / name
    for rows in (some(0, 40), some(40, 80)):
        made = write(path.with_suffix("") if path.suffix == ".gz" else path, listed(rows))
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(made.read_bytes(), mtime=0))
        os.utime(path, (1e9, 1e9))
        trained, tested = prompts(task(path.parent if path.suffix == ".arrow" else path))
        assert trained | tested == rows


def test_cells_are_texts_as_they_stand(tmp_path: Path) -> None:
    """No number, date, missing value or index is read into a cell; a byte-order mark and foreign line ends are left out."""
    cells = ["007", "1.50", "NA", "null", "2020-01-01", "True", " x ", 'the "x"', '5"']
    lines = "prompt,answer\r\n" + "".join(f"q{i},{cell}\r\n" for i, cell in enumerate(cells)) + "\r\n"
    (tmp_path / "d.csv").write_bytes(lines.encode("utf-8-sig"))
    (tmp_path / "d.test.csv").write_bytes(b"prompt,answer\nx,y\n")
    loaded = load_examples(task(tmp_path / "d.csv"), seed=0)
    assert {row["prompt"]: row["answer"] for row in loaded.train} == {
        f"q{i}": cell for i, cell in enumerate(cells)
    }


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    found = prompts(task(write(tmp_path / "a[1]b.csv")))
    assert found[0] | found[1] == some(0, 40)


def test_a_validation_split_that_is_tested_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trace_dist")
    write(tmp_path / "d/train.parquet", ROWS[:30])
    write(tmp_path / "d/validation.parquet", ROWS[30:])
    prompts(task(tmp_path / "d", name="said"))
    assert "tasks.said: there is no split test; validation is tested" in caplog.text
