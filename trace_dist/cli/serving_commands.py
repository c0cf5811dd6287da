"""``trace-dist generate`` and ``serve``: answers from a bank."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from trace_dist.serving.options import Listening, Sampling, Source
from trace_dist.serving.server import serve
from trace_dist.stages.generate import print_answers, run_generate


def generate_command(arguments: Any) -> None:
    """Answer what the command line or a file asks; print a table, or write a file.

    Raises:
        ValueError: nothing is asked, or as ``run_generate``.
    """
    paths = [None if path is None else Path(path) for path in (arguments.input, arguments.output)]
    answered = run_generate(
        _section(Source, arguments),
        _section(Sampling, arguments),
        prompts=arguments.prompt,
        file=paths[0],
        task=arguments.task,
        out=paths[1],
    )
    if paths[1] is None:
        print_answers(answered)


def serve_command(arguments: Any) -> None:
    """Serve until told to end. Raises ValueError as ``serve``."""
    serve(_section(Source, arguments), _section(Listening, arguments))


def _section(kind: Any, arguments: Any) -> Any:
    return kind(**{field.name: arguments[field.name] for field in fields(kind)})
