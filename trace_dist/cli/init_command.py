"""``trace-dist init``: a starter configuration, and what it would do."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from trace_dist.cli.commands import say_preview
from trace_dist.cli.parser import parse, run_config
from trace_dist.stages.starter import Starter, starter_config
from trace_dist.utils.files import write_text


def init_command(arguments: Any) -> None:
    """Write the configuration, then show its dry run.

    Raises:
        ValueError: the file exists, or the model or the data cannot be read.
    """
    out = Path(arguments.out)
    if out.exists():
        raise ValueError(f"out={str(out)!r}: exists already; choose another name with --out")
    if arguments.ranks < 1:
        raise ValueError(f"ranks={arguments.ranks}: must be at least 1; raise it")
    run_dir = arguments.run_dir or f"runs/{out.stem}"
    columns = {key: arguments[key] for key in ("prompt_field", "answer_field") if arguments[key] is not None}
    starter = Starter(arguments.model, arguments.data, arguments.proxy, run_dir, arguments.ranks, columns)
    write_text(out, starter_config(starter))
    try:
        parsed = parse(["run", "--config", str(out)])
        say_preview(run_config(parsed["run"]))
    except ValueError:
        print(f"written: {out}; mend it, or delete it and begin anew. What is wrong with it:")
        raise
    print(f"written: {out}; look it through, then: trace-dist run --config {shlex.quote(str(out))}")
