"""Stage ``generate``: prompts from the command line or a file, answered from a bank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from trace_dist.data.examples import Prompt
from trace_dist.serving.options import Sampling, Source
from trace_dist.serving.prompts import Question, check_prompt, read_questions
from trace_dist.utils import dist
from trace_dist.utils.files import check_writable, write_text
from trace_dist.utils.log import outcome
from trace_dist.utils.tables import print_table
from trace_dist.utils.together import on_main

Answered = list[tuple[Question, Any]]
"""Questions and their answers (``serving.router.Answer``)."""


def run_generate(
    source: Source,
    sampling: Sampling,
    *,
    prompts: Sequence[str] = (),
    file: Path | None = None,
    task: str | None = None,
    out: Path | None = None,
) -> Answered:
    """Answer prompts. Collective where the base is spread over ranks; rank 0 writes.

    Args:
        source: bank and base.
        sampling: how answers are written.
        prompts: texts.
        file: JSON lines with further prompts (``serving.prompts.read_questions``).
        task: of those that name none; None retrieves it.
        out: JSON lines to write, whole or not at all: each line of the input with the answer and how it came about.

    Raises:
        ValueError: nothing is asked, or ``out`` cannot be written or is ``file``, before anything is loaded; or as ``Router``.
    """
    asked = [Question(check_prompt(prompt, "prompt"), task) for prompt in prompts]
    asked += [] if file is None else read_questions(file, task)
    if not asked:
        raise ValueError("prompt: nothing is asked; give --prompt TEXT or --input FILE")
    if out is not None and file is not None and out.resolve() == file.resolve():
        raise ValueError(f"output={str(out)!r}: is the file of the prompts; name another file")
    dist.init_distributed()
    on_main(lambda: check_writable(out, "output"))
    found = answer(source, sampling, asked)
    if out is not None and dist.is_main():
        lines = "".join(json.dumps(_line(*each), ensure_ascii=False) + "\n" for each in found)
        try:
            write_text(out, lines)
        except ValueError:
            print(lines, end="")  # they took long, and the disk is full now
            raise
        outcome(f"{len(found)} answers in {out}")
    return found


def answer(source: Source, sampling: Sampling, asked: Sequence[Question]) -> Answered:
    """Open a bank and answer questions. Raises ValueError as ``Router``."""
    # Here, since it loads torch, and what is wrong with the questions shall be said at once.
    from trace_dist.serving.router import Router

    router = Router.of(source)
    answers = router.ask(
        [question.prompt for question in asked], [question.task for question in asked], sampling
    )
    return list(zip(asked, answers, strict=True))


def _line(question: Question, given: Any) -> dict[str, Any]:
    key = "prompt" if isinstance(question.prompt, str) else "messages"
    found = asdict(given)
    if not found["blend"]:
        del found["blend"]
    return {key: question.prompt, "answer": found.pop("text"), **found}


def print_answers(answered: Answered) -> None:
    """A table of answers, with their tasks and how sure the retrieval is of them."""
    table = Table("prompt", "task", "margin, nats", "error bound, %", "answer")
    for question, given in answered:
        margin = "-" if given.margin is None else f"{given.margin:.1f}"
        bound = "-" if given.error_bound is None else f"{100 * given.error_bound:.1f}"
        task = f"{given.task} (rejected)" if given.rejected else given.task
        if given.blend:
            task = ", ".join(f"{name} {100 * share:.0f} %" for name, share in given.blend.items())
        # As text: what a model writes is no markup.
        table.add_row(
            Text(_shown(question.prompt)),
            Text(task),
            margin,
            bound,
            Text(_printable(given.text), overflow="fold"),
        )
    print_table(table, least_width=100)


def _shown(prompt: Prompt) -> str:
    text = _printable(prompt if isinstance(prompt, str) else prompt[-1]["content"])
    return text if len(text) <= 60 else f"{text[:57]}..."


def _printable(text: str) -> str:
    """Characters that would move the cursor, or do worse, are spelled out."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )
