from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from trace_dist.config import TaskConfig
from trace_dist.data import load_examples, load_task
from trace_dist.data.generated import derived_seed

SPELL = {"dataset": "spell_backward", "min_word_len": 5, "max_word_len": 7}
SPIRAL = {"dataset": "spiral_matrix", "min_n": 2, "max_n": 2}
ROTATE = {"dataset": "rotate_matrix", "min_n": 2, "max_n": 2}
SUM = {"dataset": "chain_sum", "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def task(**options: Any) -> TaskConfig:
    return TaskConfig(**{"name": "t", "num_train": 300, "num_test": 50, **options})


def examples(num: int, prefix: str = "q") -> list[dict[str, str]]:
    return [{"prompt": f"{prefix}{i}", "answer": f"a{i}"} for i in range(num)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("options", [SPELL, SPIRAL, ROTATE])
def test_reasoning_gym_splits_share_no_prompt(options: dict[str, Any]) -> None:
    loaded = load_task(task(reasoning_gym=options), seed=3)
    assert loaded.overlap_percent == 0
    assert 270 <= len(loaded.train) <= 300
    assert len(loaded.test) == 50
    assert set(loaded.train.column_names) == {"prompt", "answer"}
    assert loaded.majority_percent < 10


def test_reasoning_gym_depends_on_the_seed_alone() -> None:
    cfg = task(reasoning_gym=SPELL)
    assert load_examples(cfg, seed=3) == load_examples(cfg, seed=3)
    assert load_examples(cfg, seed=3).test != load_examples(cfg, seed=4).test


def test_reasoning_gym_is_asked_once(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    cfg = task(reasoning_gym=SPELL)
    first = load_examples(cfg, seed=3)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert load_examples(cfg, seed=3) == first
    for other in (task(reasoning_gym=SPELL | {"max_word_len": 8}), task(reasoning_gym=SPELL, num_train=301)):
        with pytest.raises(ValueError, match="not installed"):
            load_examples(other, seed=3)
    with pytest.raises(ValueError, match="not installed"):
        load_examples(cfg, seed=4)


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"examples": ', '{"other": 1}', '{"examples": [1]}', "changed"]
)
def test_a_damaged_cache_is_generated_again(damage: str, own_cache: Path) -> None:
    cfg = task(reasoning_gym=SPELL)
    first = load_examples(cfg, seed=3)
    kept = list(own_cache.rglob("*.json"))
    assert len(kept) == 2
    for path in kept:
        text = path.read_text()
        path.write_text(text.replace("a", "b", 1) if damage == "changed" else damage)
    assert load_examples(cfg, seed=3) == first


def test_neighbouring_seeds_would_overlap_so_splits_use_unrelated_ones() -> None:
    import reasoning_gym

    near = [
        reasoning_gym.create_dataset("spell_backward", size=9, seed=seed)[0]["question"] for seed in (1, 2)
    ]
    assert near[1] == reasoning_gym.create_dataset("spell_backward", size=9, seed=1)[1]["question"]
    assert abs(derived_seed(1, "train") - derived_seed(1, "test")) > 10**6
    assert abs(derived_seed(1, "train") - derived_seed(2, "train")) > 10**6


def test_task_with_too_few_prompts_keeps_and_reports_the_overlap(caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_task(task(reasoning_gym=SUM, num_train=2000, num_test=200), seed=0)
    assert len(loaded.train) == 2000
    assert loaded.overlap_percent > 90
    assert "too few prompts" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "no_such_dataset"}, "no_such_dataset.*not registered"),
        ({"dataset": "chain_sum", "wrong": 1}, "unexpected keyword argument 'wrong'"),
        ({"dataset": "chain_sum", "min_terms": 3, "max_terms": 1}, "max_terms must be >= min_terms"),
        ({"dataset": "chain_sum", "seed": 1}, "'seed' is set by num_train"),
        ({"dataset": "rubiks_cube"}, "no reference answer"),
    ],
)
def test_reasoning_gym_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"tasks\.t\.reasoning_gym.*{message}"):
        load_examples(task(reasoning_gym=options, num_train=3, num_test=3), seed=0)


def test_missing_reasoning_gym_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"trace-dist\[eval\]"):
        load_examples(task(reasoning_gym=SPELL), seed=0)


def test_jsonl_is_split_by_hash_and_an_example_stays_on_its_side(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", examples(400))
    cfg = task(path=path, num_train=10**6, num_test=10**6)
    before = load_examples(cfg, seed=0)
    assert 20 <= len(before.test) <= 60
    assert len(before.train) + len(before.test) == 400
    write_jsonl(tmp_path / "d.jsonl", examples(500))
    after = load_examples(cfg, seed=1)
    assert {row["prompt"] for row in before.test} <= {row["prompt"] for row in after.test}
    assert {row["prompt"] for row in before.train} <= {row["prompt"] for row in after.train}


def test_jsonl_with_a_test_file_beside_it(tmp_path: Path) -> None:
    rows = [{"q": i, "a": i / 2, "rest": None} for i in range(20)] + [{"q": "x\u2028y", "a": "z"}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    write_jsonl(tmp_path / "d.test.jsonl", [{"q": 3, "a": 1.5}, {"q": "new", "a": "b"}])
    splits = load_examples(task(path=path, prompt_field="q", answer_field="a"), seed=0)
    assert sorted(row["prompt"] for row in splits.test) == ["3", "new"]
    assert len(splits.train) == 20  # 21 less the one that is tested
    assert {"prompt": "4", "answer": "2.0"} in splits.train
    assert {"prompt": "x\u2028y", "answer": "z"} in splits.train


def test_trace_folder(tmp_path: Path) -> None:
    for split, num in (("train", 30), ("eval", 5), ("test", 12)):
        (tmp_path / f"{split}.json").write_text(json.dumps(examples(num, split)))
    splits = load_examples(task(path=str(tmp_path), num_train=20, num_test=10), seed=0)
    assert len(splits.train) == 20
    assert len(splits.test) == 10
    assert {row["prompt"][:4] for row in splits.test} == {"test"}
    (tmp_path / "test.json").unlink()
    with pytest.raises(ValueError, match=r"no test\.json, the folder has \['eval\.json', 'train\.json'\]"):
        load_examples(task(path=str(tmp_path)), seed=0)


def test_datasets_folders(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(examples(300))
    whole.save_to_disk(str(tmp_path / "whole"))
    one = load_examples(task(path=str(tmp_path / "whole"), num_train=999, num_test=999), seed=0)
    assert len(one.train) + len(one.test) == 300
    parts = datasets.DatasetDict(train=whole, test=datasets.Dataset.from_list(examples(9, "t")))
    parts.save_to_disk(str(tmp_path / "parts"))
    two = load_examples(task(path=str(tmp_path / "parts"), num_train=999), seed=0)
    assert (len(two.train), len(two.test)) == (300, 9)
    datasets.DatasetDict(train=whole).save_to_disk(str(tmp_path / "half"))
    with pytest.raises(ValueError, match=r"no split 'test', it has \['train'\]"):
        load_examples(task(path=str(tmp_path / "half")), seed=0)
    (tmp_path / "parts" / "train" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_examples(task(path=str(tmp_path / "parts")), seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train split is empty"),
        ('{"prompt": "a", "answer": "b"}\n', "1 examples are too few"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt"\n', r"bad\.jsonl:2: not valid JSON"),
        ("[1]\n", "example 0 is a list, not an object"),
        (
            '{"prompt": "a", "label": "b"}\n',
            r"no column 'answer', it has \['label', 'prompt'\].*answer_field",
        ),
        ('{"prompt": "a", "answer": null}\n', "column 'answer': None is neither a string nor a number"),
        ('{"prompt": ["a"], "answer": "b"}\n', r"column 'prompt': \['a'\] is neither"),
    ],
)
def test_jsonl_errors(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_examples(task(path=str(path)), seed=0)
    assert "\n" not in str(error.value)


ROWS = [{"prompt": f"caf\u00e9 {i}?", "answer": str(i % 3)} for i in range(60)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def test_byte_order_marks_and_line_ends_of_other_systems_are_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(LINES.encode())
    expected = load_examples(task(path=str(path)), seed=0)
    joined = [LINES[: LINES.index("\n") + 1], LINES[LINES.index("\n") + 1 :]]
    for content in (
        LINES.encode("utf-8-sig"),
        b"".join(part.encode("utf-8-sig") for part in joined),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
    ):
        path.write_bytes(content)
        assert load_examples(task(path=str(path)), seed=0) == expected
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_bytes(json.dumps(ROWS).encode("utf-8-sig"))
    assert len(load_examples(task(path=str(tmp_path)), seed=0).test) == 50


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", ":3: byte 0xe9 is not UTF-8"),
        ("cp1252", ":3: byte 0xe9 is not UTF-8"),
        ("utf-16", ":1: this is UTF-16 or UTF-32"),
        ("utf-16-le", ":1: this is UTF-16 or UTF-32"),
        ("utf-32", ":1: this is UTF-16 or UTF-32"),
    ],
)
def test_other_encodings_are_named_with_file_and_line(tmp_path: Path, encoding: str, message: str) -> None:
    ascii_lines = json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + "\n"
    (tmp_path / "d.jsonl").write_bytes((ascii_lines + LINES).encode(encoding))
    with pytest.raises(ValueError, match=rf"d\.jsonl{message}.*save the file as UTF-8"):
        load_examples(task(path=str(tmp_path / "d.jsonl")), seed=0)
    (tmp_path / "train.json").write_bytes(
        ("[\n\n" + json.dumps(ROWS, ensure_ascii=False) + "]").encode(encoding)
    )
    with pytest.raises(ValueError, match=rf"train\.json{message}"):
        load_examples(task(path=str(tmp_path)), seed=0)


@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_half_a_character_is_named_with_its_example(tmp_path: Path, column: str) -> None:
    rows = [*ROWS[:5], {**ROWS[5], column: "hi \ud83d there"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"d\.jsonl: example 5, column '{column}'.*half of a character"):
        load_examples(task(path=str(tmp_path / "d.jsonl")), seed=0)
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"train\.json: example 5, column '{column}'.*half of a character"):
        load_examples(task(path=str(tmp_path)), seed=0)


def test_bytes_that_a_dataset_calls_a_string_are_named_with_their_example(tmp_path: Path) -> None:
    prompts = pa.array([b"a", b"b", b"caf\xe9"]).view(pa.string())
    table = pa.table({"prompt": prompts, "answer": pa.array(["x", "y", "z"])})
    datasets.Dataset(table).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ValueError, match="example 2: not UTF-8"):
        load_examples(task(path=str(tmp_path / "d")), seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 10**5, "nested too deep"), ('{"prompt": ' + "1" * 5000 + "}", "not valid JSON")],
)
def test_json_that_python_cannot_hold_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "d.jsonl").write_text("\n" + text)
    with pytest.raises(ValueError, match=rf"d\.jsonl:2: .*{message}"):
        load_examples(task(path=str(tmp_path / "d.jsonl")), seed=0)
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ValueError, match=rf"train\.json: .*{message}"):
        load_examples(task(path=str(tmp_path)), seed=0)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(ValueError, match=r"d\.jsonl: cannot be read \(Input/output error\)"):
        load_examples(task(path=str(tmp_path / "d.jsonl")), seed=0)


def test_path_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tasks\.t\.path=.*no such file or folder"):
        load_examples(task(path=str(tmp_path / "missing.jsonl")), seed=0)
    (tmp_path / "d.xyz").write_text("prompt,answer\n")
    for path in (tmp_path, tmp_path / "d.xyz"):
        with pytest.raises(ValueError, match=r"tasks\.t\.path=.* \.jsonl"):
            load_examples(task(path=str(path)), seed=0)


def test_task_baselines(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": f"p{i}", "answer": "yes" if i % 3 else "no"} for i in range(30)]
    )
    tests = [{"prompt": f"t{i}", "answer": "yes" if i < 3 else "maybe"} for i in range(8)]
    write_jsonl(tmp_path / "d.test.jsonl", tests)
    loaded = load_task(task(path=path, metric="choice"), seed=0)
    assert loaded.majority_percent == 37.5  # 3 of 8, although the tests' own majority is "maybe"
    assert loaded.choices == ["maybe", "no", "yes"]
    assert load_task(task(path=path), seed=0).choices is None
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "answer": "yes"} for i in range(9)])
    write_jsonl(tmp_path / "d.test.jsonl", [{"prompt": "t", "answer": " yes"}])
    with pytest.raises(ValueError, match="use metric exact_match"):
        load_task(task(path=path, metric="choice"), seed=0)
