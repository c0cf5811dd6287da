"""``trace-dist generate``, ``serve`` and ``lm-eval``: answers from a bank."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trace_dist.serving.options import Listening, Sampling, Source, check_task
from trace_dist.serving.server import serve
from trace_dist.stages.generate import print_answers, run_generate
from trace_dist.utils import dist


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
    if paths[1] is None and dist.is_main():
        print_answers(answered)


def serve_command(arguments: Any) -> None:
    """Serve until told to end. Raises ValueError as ``serve``."""
    serve(_section(Source, arguments), _section(Listening, arguments))


def lm_eval_command(arguments: Any) -> None:
    """Run lm-evaluation-harness on a bank: its own command line, with our model.

    Raises:
        ValueError: the harness is not installed, nothing is to be evaluated, or as ``Router.open``.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("lm-eval: lm_eval is not installed; pip install 'trace-dist[lm-eval]'")
    source = _section(Source, arguments)
    source.check_alone("lm-eval")
    if not arguments.harness:
        raise ValueError(
            "lm-eval: no options of the harness are given; write them behind --, as -- --tasks arc_easy"
        )
    from trace_dist.bank.bank import BASE, DeltaBank

    # The harness takes seconds to look through its tasks.
    check_task(arguments.task, list(dict.fromkeys([BASE, *DeltaBank(arguments.bank).tasks])))
    from lm_eval._cli import HarnessCLI

    from trace_dist.serving.harness import NAME

    model = asdict(source) | {"task": arguments.task}
    batch_size = str(model.pop("batch_size"))
    # The harness reads the command line itself; of what is given twice the last word counts.
    before = sys.argv
    sys.argv = ["lm-eval", "run", "--batch_size", batch_size, *arguments.harness, "--model", NAME]
    sys.argv += ["--model_args", json.dumps(model)]
    try:
        harness = HarnessCLI()
        harness.execute(harness.parse_args())
    finally:
        sys.argv = before


def _section(kind: Any, arguments: Any) -> Any:
    return kind(**{field.name: arguments[field.name] for field in fields(kind)})
