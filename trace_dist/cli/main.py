"""Parse the arguments, run the command, and turn user errors into one line and exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from trace_dist.cli.errors import StageFailed, report_error
from trace_dist.cli.lifetime import end_with_run
from trace_dist.cli.parser import OWN_ARGUMENTS, RUN_COMMANDS, build_parser, run_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments; ``sys.argv`` when None.

    Returns:
        Exit code: 0, or 2 after an error of the user's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    arguments = [
        a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))
    ]  # added by launchers
    end_with_run()
    parser = build_parser()
    try:
        parsed = parser.instantiate_classes(parser.parse_args(arguments))
    except ValueError as error:
        report_error(error)
        return 2
    _quiet()
    from trace_dist.cli import commands
    from trace_dist.utils import dist, locks
    from trace_dist.utils.log import get_logger, setup_logging

    setup_logging()
    values = parsed[parsed.command]
    try:
        if parsed.command in RUN_COMMANDS:
            own = {name: values[name] for name in OWN_ARGUMENTS.get(parsed.command, ())}
            _command(commands, parsed.command)(run_config(values), **own)
        else:
            _command(commands, parsed.command)(values)
    except ValueError as error:
        report_error(error)
        return 2
    except StageFailed as error:
        get_logger(__name__).error(error)
        return 2
    finally:
        locks.release()
        dist.close()
    return 0


def _command(module: Any, name: str) -> Callable[..., None]:
    return getattr(module, f"{name}_command")


def _quiet() -> None:
    """Keep the libraries' chatter out of the log."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    for name in ("DeepSpeed", "transformers", "datasets", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
