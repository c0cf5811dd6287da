"""Parse the arguments, run the command, and turn user errors into one line and exit code 2."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from trace_dist.cli.arguments import RUN_COMMANDS
from trace_dist.cli.errors import explain_system, report_error
from trace_dist.cli.lifetime import end_with_run
from trace_dist.cli.parser import parse, run_config
from trace_dist.launching import ProcessFailed
from trace_dist.utils.imports import importing
from trace_dist.utils.launch import launched_rank

ROOMS = {
    "bank": "bank_commands",
    "bench": "bench_commands",
    "generate": "serving_commands",
    "init": "init_command",
    "lm-eval": "serving_commands",
    "mask": "mask_commands",
    "memory": "memory_commands",
    "serve": "serving_commands",
    "study": "study_commands",
}
"""Commands beside those on a run -> the module of their function ``NAME_command``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments; ``sys.argv`` when None.

    Returns:
        Exit code: 0, or 2 after an error of the user's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Added by launchers.
    words = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
    end_with_run()
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads the output has seen enough, as `| head`; nothing is flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(words: Sequence[str]) -> int:
    try:
        parsed = parse(words)
    except ValueError as error:
        report_error(error)
        return 2
    _quiet()
    with importing():
        from trace_dist.utils import dist, locks
        from trace_dist.utils.log import get_logger, setup_logging

    setup_logging()
    try:
        _command(parsed.command, parsed[parsed.command])
    except ValueError as error:
        report_error(error)
        return 2
    except ConnectionError:
        # A reader that went away, or a rank: not a file.
        raise
    except OSError as error:
        report_error(explain_system(error))
        return 2
    except ProcessFailed as error:
        get_logger(__name__).error(error)
        return 2
    finally:
        locks.release()
        dist.close()
    return 0


def _command(name: str, values: Any) -> None:
    """Run a command; what it imports is slow, and a wrong command line shall be answered at once."""
    if name in RUN_COMMANDS:
        with importing():
            from trace_dist.cli.commands import RUN

        own = {argument: values[argument] for argument in RUN_COMMANDS[name].own}
        RUN[name](run_config(values), **own)
        return
    with importing():
        room = import_module(f"trace_dist.cli.{ROOMS[name]}")
    getattr(room, f"{name.replace('-', '_')}_command")(values)


def _quiet() -> None:
    """Keep the libraries' chatter out of the log, and let rank 0 alone pass their warnings on."""
    if launched_rank():
        warnings.simplefilter("ignore")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    for name in ("DeepSpeed", "transformers", "datasets", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
