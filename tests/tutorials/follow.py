"""``python follow.py STEPS RESULTS``: one process that carries out what pages say, one import of torch for all of it.

``STEPS`` is a JSON list: a list of words is a ``trace-dist`` command, a text is Python. ``RESULTS`` receives what each printed,
and where the packages were imported from. It ends at the first command that fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import trace_kernels

import trace_dist
from trace_dist.cli import main


def follow(steps: list[str | list[str]]) -> list[str]:
    said = []
    for step in steps:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            if isinstance(step, str):
                exec(compile(step, "page", "exec"), {})
            elif main(step) != 0:
                sys.exit(f"{step}\n{out.getvalue()}")
        said.append(out.getvalue())
    return said


if __name__ == "__main__":
    said = follow(json.loads(Path(sys.argv[1]).read_text()))
    homes = [str(trace_dist.__file__), str(trace_kernels.__file__)]
    Path(sys.argv[2]).write_text(json.dumps({"said": said, "homes": homes}))
