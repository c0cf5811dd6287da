"""``trace-dist launch [--dry_run true] COMMAND ...``: a command on the ranks that its configuration asks for."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from trace_dist.cli.arguments import LAUNCHED
from trace_dist.cli.parser import parse, run_config
from trace_dist.config import RunConfig
from trace_dist.launching import ranks_environment
from trace_dist.launching.checks import check_hosts
from trace_dist.launching.commands import starts
from trace_dist.launching.hosts import hosts_of
from trace_dist.launching.scratch import scratch_folder
from trace_dist.launching.supervisor import supervise


def launch_command(dry_run: bool, words: Sequence[str]) -> int:
    """Start a command on its ranks, or say what would be started.

    Args:
        dry_run: whether nothing is started.
        words: the command and its arguments.

    Returns:
        Exit code of the whole.

    Raises:
        ValueError: it is no command for ranks, its configuration makes no sense, or a host is not ready.
        KeyboardInterrupt: Ctrl+C has ended the ranks.
    """
    if not words or (words[0] not in LAUNCHED and not dry_run):
        what = words[0] if words else "nothing"
        raise ValueError(
            f"launch: {what} is not started on ranks; name one of {', '.join(LAUNCHED)} (`run` starts its stages on ranks by "
            "itself: trace-dist run)"
        )
    parsed = parse(words)
    cfg = run_config(parsed[words[0]])
    os.environ.update(ranks_environment(cfg.launch))
    if not dry_run:
        code = supervise(cfg.launch, "trace_dist", words)
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        return code
    say_hosts(cfg, words)
    return 0


def say_hosts(cfg: RunConfig, words: Sequence[str]) -> None:
    """Print what would be started where, and what the hosts say.

    Raises:
        ValueError: a host is not ready; the message names each reason.
    """
    with scratch_folder() as scratch:
        for start in starts(cfg.launch, "trace_dist", words, os.environ, scratch):
            own = [f"{name}={value}" for name, value in start.environment.items()]
            print(f"{start.host or 'here'}: {shlex.join([*own, *start.command])}")
    hosts = hosts_of(cfg.launch)
    if not hosts:
        return
    findings = check_hosts(hosts, cfg.run_dir, _files(cfg, words), os.environ)
    print(*findings.lines, sep="\n")
    if findings.problems:
        raise ValueError(f"the hosts are not ready: {'; '.join(findings.problems)}")
    print(f"{len(hosts)} hosts are ready")


def _files(cfg: RunConfig, words: Sequence[str]) -> list[str]:
    """Files and folders that every rank reads, as far as they are there."""
    named = [after for word, after in pairwise(words) if word in ("--config", "--mask_file")]
    models = [cfg.target.path, cfg.probed.path]
    masks = [str(cfg.folder.mask(task.name)) for task in cfg.tasks]
    data = [str(task.path) for task in (*cfg.tasks, *cfg.general) if task.path]
    return [name for name in dict.fromkeys([*named, *models, *masks, *data]) if Path(name).exists()]
