"""Parse the arguments, run the command, and turn user errors into one line and exit code 2."""

from __future__ import annotations

import atexit
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from trace_dist.cli.arguments import GOES_ON, RUN_COMMANDS
from trace_dist.cli.errors import explain_system, report_error
from trace_dist.cli.lifetime import end_with_parents, outlive_terminals
from trace_dist.cli.parser import parse, run_config, split_launch
from trace_dist.cli.streams import OUTPUT, lose_output, name_output, open_streams
from trace_dist.launching import ProcessFailed
from trace_dist.utils.codes import FAILED, LOST
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
    "simulate": "simulate_command",
    "study": "study_commands",
}
"""Commands beside those on a run -> the module of their function ``NAME_command``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments; ``sys.argv`` when None.

    Returns:
        Exit code: 0; 2 after an error of the user's; 75 where the same command, started again, goes on: it was asked to stop,
        or a rank was lost; 130 after Ctrl+C, which ends the process itself where ``argv`` is None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Added by launchers.
    words = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
    open_streams()
    end_with_parents()
    outlive_terminals()
    _say_everything()
    name_output()
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads the output has seen enough, as `| head`; nothing is flushed into the pipe at exit.
        lose_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename != OUTPUT:
            raise
        lose_output()
        report_error(explain_system(error))
        return FAILED
    except KeyboardInterrupt:
        if not launched_rank():
            again = "; start the same command again to go on" if words[:1] and words[0] in GOES_ON else ""
            print(f"interrupted{again}", file=sys.stderr, flush=True)
        if argv is None:
            # Not by an exit code: a shell ends its loop over commands only with one that the signal has ended. Whoever has no
            # patience for the end is obeyed at once.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            atexit._run_exitfuncs()
            os.kill(os.getpid(), signal.SIGINT)
        return 128 + signal.SIGINT


def _say_everything() -> None:
    """Characters that the output's encoding lacks (a dash in ASCII, a name in another script) are written as their numbers; they
    would end a command that has done its work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _run(words: Sequence[str]) -> int:
    try:
        parsed = parse(words)
        if parsed.command == "launch":
            from trace_dist.cli.launch_command import launch_command

            return launch_command(parsed.launch.dry_run, split_launch(words)[1])
    except (ValueError, OSError) as error:
        if not _is_users(error):
            raise
        report_error(explain_system(error) if isinstance(error, OSError) else error)
        return FAILED
    _quiet()
    with importing():
        from trace_dist.utils import dist, locks, stopping
        from trace_dist.utils.log import setup_logging

    setup_logging()
    stopping.listen_for_signals()
    code = 1
    try:
        code = _outcome(parsed.command, parsed[parsed.command])
    finally:
        locks.release()
        dist.close(ok=code in (0, LOST))
    return code


def _outcome(name: str, values: Any) -> int:
    """Run a command; its exit code."""
    from trace_dist.utils import dist
    from trace_dist.utils.heartbeat import report
    from trace_dist.utils.log import get_logger
    from trace_dist.utils.stopping import Stopped

    try:
        _command(name, values)
    except Stopped as stopped:
        get_logger(__name__).warning("stopped as asked: %s; start the same command again to go on", stopped)
        return LOST
    except ProcessFailed as error:
        get_logger(__name__).error(error)
        return error.code
    except Exception as error:
        verdict = None if _is_users(error) else dist.lost()
        if verdict is not None:
            if verdict.text and dist.claim_verdict():
                report(verdict.text, dist.rank())
            return verdict.code
        dist.leave(ok=False)
        if not _is_users(error):
            raise
        report_error(explain_system(error) if isinstance(error, OSError) else error)
        return FAILED
    return 0


def _is_users(error: Exception) -> bool:
    """Whether an error is of what the user gave; a reader or a rank that went away is none, and no file, nor is an output that
    takes no more: ``main`` says so."""
    if isinstance(error, OSError) and error.filename == OUTPUT:
        return False
    return isinstance(error, ValueError | OSError) and not isinstance(error, ConnectionError)


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
