"""``trace-dist generate``: what it writes, what it refuses, and the page that explains it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from serving.small import TASKS, Small, prompts

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.cli.parser import parse
from trace_dist.cli.serving_commands import generate_command
from trace_dist.serving import router
from trace_dist.serving.prompts import Question, read_questions
from trace_dist.serving.router import Answer
from trace_dist.stages import generate as generating
from trace_dist.stages.generate import print_answers

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def generate(small: Small, *words: object) -> None:
    source = ("--bank", small.bank, "--base", small.base)
    generate_command(parse(["generate", *map(str, (*source, *words))]).generate)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_every_line_is_answered_in_its_place(small: Small, tmp_path: Path) -> None:
    texts = {task: prompts(task, 2, seed=6) for task in TASKS[:3]}
    lines: list[dict[str, Any]] = []
    for number in range(2):
        for task in texts:
            text = texts[task][number]
            asked = {"prompt": text} if number else {"messages": [{"role": "user", "content": text}]}
            lines.append(asked | ({"task": "copy"} if task == "twist" and number else {}))
    out = tmp_path / "answers" / "answers.jsonl"
    file = write(tmp_path / "prompts.jsonl", "\ufeff", *lines, "")
    generate(small, "--input", file, "--output", out, "--max_new_tokens", 5)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: row[key] for key in ("prompt", "messages") if key in row} for row in rows] == [
        {key: line[key] for key in ("prompt", "messages") if key in line} for line in lines
    ]
    answered = ["copy", "twist", "plain", "copy", "copy", "plain"]
    assert [row["task"] for row in rows] == answered
    wanted = [small.expected(task, [text], 5)[0] for task, text in zip(
        answered, [texts[task][number] for number in range(2) for task in texts], strict=True
    )]  # fmt: skip
    assert [row["answer"] for row in rows] == wanted
    assert rows[4]["margin"] is None
    assert all(row["margin"] > 0 and not row["rejected"] for row in rows[:4])
    assert all(0 < row["error_bound"] < 1 for row in rows)


def test_without_a_file_a_table_is_printed(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [prompts("copy", 1)[0], "twist: [bold]ab[/bold]"]
    generate(small, "--max_new_tokens", "4", "--prompt", *texts)
    shown = capsys.readouterr().out
    rows = [re.split(r" *│ *", line)[1:-1] for line in shown.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == texts  # neither YAML nor markup
    assert rows[0][1] == "copy"
    assert float(rows[0][2]) > 0
    assert rows[0][4] == small.expected("copy", texts[:1], 4)[0].strip()
    long = Answer("x" * 300, "copy", None, False, None, "length", 1, 300)
    print_answers([(Question("a", None), long)])
    assert capsys.readouterr().out.count("x") == 300
    generate(small, "--max_new_tokens", "4", "--task", BASE, "--prompt", texts[0])
    assert re.search(r"│ base +│ - ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("{", "not valid JSON"),
        ([], "a list, not an object"),
        ({"promt": "a"}, "unknown key 'promt'; the keys are prompt, messages, task"),
        ({"task": "copy"}, "needs `prompt` or `messages`, and has 0 of them"),
        ({"prompt": "a", "messages": []}, "and has 2 of them"),
        ({"prompt": 7}, "prompt=7: must be a text"),
        ({"messages": "a"}, "messages='a': must be a list of turns"),
        ({"messages": []}, r"messages: must be a text or a list of turns"),
        (
            {"messages": [{"role": "user", "content": "a", "name": "b"}]},
            "messages: turn 1: .*must be an object of",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "messages: turn 1: content=3: must be a text"),
        ({"prompt": "a", "task": 3}, "task=3: must be the name of a task"),
        ('{"prompt": "\\ud83d"}', "prompt: .*holds half of a character"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: Any, fragment: str, tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.jsonl", {"prompt": "a"}, "", line)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}:3: .*{fragment}"):
        read_questions(file)


def test_nothing_is_loaded_for_what_cannot_be_answered(small: Small, tmp_path: Path) -> None:
    missing, empty = tmp_path / "none.jsonl", write(tmp_path / "empty.jsonl")
    asked = write(tmp_path / "asked.jsonl", {"prompt": "a"})
    (tmp_path / "linked.jsonl").symlink_to(asked)
    for words, fragment in (
        ((), "prompt: nothing is asked; give --prompt TEXT or --input FILE"),
        (("--input", missing), f"input='{missing}': no such file"),
        (("--input", empty), "holds no prompt; write one object per line"),
        (("--prompt", "a", "--output", tmp_path), f"output='{tmp_path}': is a folder"),
        (
            ("--input", asked, "--output", tmp_path / "linked.jsonl"),
            "linked.jsonl': is the file of the prompts",
        ),
        (
            ("--prompt", "a", "--output", empty / "a.jsonl"),
            f"output='{empty / 'a.jsonl'}': cannot be written",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(fragment)):
            generate(Small(tmp_path), *words)
    with pytest.raises(ValueError, match="task='nobody': the bank does not hold it"):
        generate(small, "--prompt", "a", "--task", "nobody")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def quickstart(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small bank where the page has the quickstart's."""
    run = tmp_path / "runs" / "quickstart"
    (run / "models").mkdir(parents=True)
    (run / "models" / "target").symlink_to(small.base)
    shutil.copytree(small.bank, run / "bank")
    DeltaBank(run / "bank").rename("copy", "reverse")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(router, "MOST_TOKENS", 8)


@pytest.mark.usefixtures("quickstart")
def test_the_page_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    """Its commands run, but for the server, which test_server.py starts; its Python too, but for the client's."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    (input_file,) = blocks("json")
    Path("prompts.jsonl").write_text(input_file)
    parsed = [parse(shlex.split(line)[1:]) for line in lines if line.startswith("trace-dist")]
    assert [one.command for one in parsed] == ["generate", "generate", "serve"]
    spread = parse(shlex.split(lines[2].partition(" -m trace_dist ")[2])).generate
    assert (spread.backend, spread.output) == ("fsdp2", "answers.jsonl")
    assert lines[3] == 'pip install "trace-dist[serve]"'
    for one in parsed[:2]:
        generate_command(one.generate)
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [sorted(row) for row in rows] == [
        sorted({"prompt" if number != 1 else "messages", *FIELDS}) for number in range(3)
    ]
    assert rows[2]["task"] == "reverse"
    capsys.readouterr()
    exec(compile(blocks("python")[0], "serving.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3


FIELDS = ("answer", "task", "margin", "rejected", "error_bound", "finish", "num_prompt_tokens", "num_tokens")


def test_answers_that_cannot_be_written_any_more_are_printed(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise ValueError("answers.jsonl: cannot be written (No space left on device)")

    monkeypatch.setattr(generating, "write_text", full)
    with pytest.raises(ValueError, match="No space left"):
        generate(
            small, "--prompt", "copy abcd", "--max_new_tokens", 8, "--output", tmp_path / "answers.jsonl"
        )
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["answer"] == small.expected("copy", ["copy abcd"])[0]
