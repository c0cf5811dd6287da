"""The real command line on tiny models and tasks, as a process of its own."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import yaml
from launching import python, rank_environment

from trace_dist.cli.main import main


def write_tasks(folder: Path, num_examples: int = 60) -> None:
    """Three tasks over four letters: copy, twist (reverse) and plain."""
    generator = random.Random(0)
    for name in ("copy", "twist", "plain"):
        rows = []
        for _ in range(num_examples):
            word = "".join(generator.choices("abcd", k=4))
            rows.append({"prompt": f"{name} {word}", "answer": word[::-1] if name == "twist" else word})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_config(folder: Path) -> dict[str, Any]:
    """A run that takes seconds; its tasks lie in ``folder``."""
    tiny = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48, "batch_size": 8}
    run = folder / "run"
    return {
        "run_dir": str(run),
        "target": {"path": str(run / "models" / "target"), "tiny": {**tiny, "steps": 4}},
        "proxy": {"path": str(run / "models" / "proxy"), "tiny": {**tiny, "hidden_size": 16, "steps": 4}},
        "tasks": [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in ("copy", "twist")],
        "general": [{"name": "plain", "path": str(folder / "plain.jsonl")}],
        "probe": {"steps": 2, "batch_size": 8, "fisher_batches": 1},
        "projection": {"options": {"steps": 2}},
        "train": {"steps": 4, "batch_size": 8, "micro_batch_size": 8, "warmup_steps": 1},
        "bank": {"num_prompts": 20, "clusters": 1},
    }


def write_config(folder: Path, config: dict[str, Any], name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return path


def environment(cache: Path) -> dict[str, str]:
    """One thread per process, no hub, tokenised data in a folder of the test's own."""
    return rank_environment() | {"HF_DATASETS_CACHE": str(cache), "PYTHONPATH": ""}


def run(
    *arguments: object,
    cache: Path,
    launcher: list[str] | None = None,
    changes: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """``python -m trace_dist arguments...``; ``launcher`` is what starts its ranks, ``changes`` are to the environment."""
    start = [python(), *(launcher or []), *([] if launcher else ["-m"]), "trace_dist"]
    return subprocess.run(
        [*start, *map(str, arguments)],
        env=environment(cache) | dict(changes or {}),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cache.parent,
    )


def run_here(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    """``run`` in this process: for what a command says and writes, since seconds of imports are saved."""
    words, out, err = [str(argument) for argument in arguments], StringIO(), StringIO()
    logger = logging.getLogger("trace_dist")
    before = logger.handlers[:], logger.level, logger.propagate
    with (
        patch.dict(os.environ, environment(cache)),
        patch.object(datasets.config, "HF_DATASETS_CACHE", cache),
        chdir(cache.parent),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            code = main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            logger.handlers[:], logger.level, logger.propagate = before
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that explains a failure; fails where there is none, more than one, or a traceback."""
    output = done.stdout + "\n" + done.stderr
    assert done.returncode != 0, output[-4000:]
    lines = [line for line in output.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1, output[-4000:]
    assert "Traceback" not in output, output[-4000:]
    return lines[0]


def files(folder: Path) -> list[str]:
    """Every file below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def processes_with(text: str) -> list[int]:
    """Processes other than this one whose command line holds ``text``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in command and is_alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether something comes true in so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return condition()
