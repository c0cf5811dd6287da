"""Commands that work on a run: a few lines over its stages.

A command checks its configuration before the slow imports of its stage, since it may refuse.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from trace_dist.config import RunConfig
from trace_dist.launching import run_holders
from trace_dist.stages.stage import Stage
from trace_dist.stages.start import changed, check_start, start, take_folder
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger
from trace_dist.utils.tables import print_table
from trace_dist.utils.together import on_main

logger = get_logger(__name__)


def run_command(cfg: RunConfig, dry_run: bool) -> None:
    if dry_run:
        check_start(cfg, "run")
        _check_examples(cfg)
        _check_bank(cfg)
        say_preview(cfg)
        say_hosts_of_stages(cfg)
        return
    start(cfg, "run")
    from trace_dist.stages.ask import ask_bank, asks
    from trace_dist.stages.generate import print_answers
    from trace_dist.stages.pipeline import run_pipeline, stage_groups
    from trace_dist.stages.words import next_steps

    _check_examples(cfg)
    _check_bank(cfg)
    run_pipeline(cfg, stage_groups(cfg))
    say_report(cfg)
    if asks(cfg):
        print_answers(ask_bank(cfg))
    if cfg.bank_of().index.is_file():
        print(next_steps(cfg))


def _check_examples(cfg: RunConfig) -> None:
    """Raise ValueError where results are of other examples than the run's paths hold now; once, not in each stage of a run.
    Collective."""
    from trace_dist.continual.same_examples import check_examples

    on_main(lambda: None if run_holders() else check_examples(cfg))


def _check_bank(cfg: RunConfig) -> None:
    """Raise ValueError where what a run learns does not fit its bank, or its masks find no room beside the tasks there."""
    from trace_dist.bank.bank import DeltaBank
    from trace_dist.continual.earlier import check_room_beside
    from trace_dist.stages.learn import METHOD, check_fits, check_names

    if cfg.bank_of().index.is_file():
        bank = DeltaBank(cfg.bank_of().root)
        # Its own one was made by this run.
        fills = METHOD in cfg.continual.methods and cfg.bank.path is not None
        if fills and not cfg.folder.method(METHOD).is_file():
            check_names(cfg, bank)
            check_fits(cfg, bank)
        check_room_beside(cfg, bank)


def learn_command(cfg: RunConfig, mask_file: str | None, dry_run: bool) -> None:
    from trace_dist.stages.learn import as_learned, check_new, run_learn, stages_of

    cfg = as_learned(cfg)
    if dry_run:
        check_start(cfg, "learn", mask_file is not None)
        check_new(cfg, mask_file is not None)
        _check_examples(cfg)
        first, masked = stages_of(cfg, mask_file)
        say_preview(cfg, [first, [masked]], mask_file is not None)
        say_hosts_of_stages(cfg)
        return
    start(cfg, "learn", mask_file=mask_file)
    _check_examples(cfg)
    run_learn(cfg, mask_file)


def consolidate_command(cfg: RunConfig) -> None:
    from trace_dist.stages.consolidate import as_consolidated, next_step, run_consolidate

    cfg = as_consolidated(cfg)
    start(cfg, "consolidate")
    print_scores(run_consolidate(cfg))
    if dist.is_main():
        print(next_step(cfg))


def say_preview(
    cfg: RunConfig, groups: Sequence[Sequence[Stage]] | None = None, mask_given: bool = False
) -> None:
    """Print what a run would do; nothing is written.

    Args:
        cfg: the run.
        groups: its stages; those of ``run`` when None.
        mask_given: whether the tasks' masks need not be made.
    """
    from trace_dist.stages.preview import describe, preview

    # As each stage will, this process has loaded the libraries by now.
    start_seconds = time.process_time()
    table, lines = describe(cfg, preview(cfg, groups, mask_given), start_seconds)
    print_table(table, least_width=100)
    print("\n".join(lines))


def say_hosts_of_stages(cfg: RunConfig) -> None:
    """Print how the longest stage would be started on several hosts, and what these say; nothing for this machine alone.

    Raises:
        ValueError: a host is not ready.
    """
    if cfg.launch.hostfile is not None:
        from trace_dist.cli.launch_command import say_hosts

        say_hosts(cfg, ["continual", "--config", str(cfg.folder.config)])


def base_command(cfg: RunConfig, which: str | None) -> None:
    start(cfg, "base", which=which)
    from trace_dist.stages.base import run_base

    run_base(cfg, which)


def probe_command(cfg: RunConfig) -> None:
    start(cfg, "probe")
    from trace_dist.stages.probe import run_probe

    run_probe(cfg)


def project_command(cfg: RunConfig) -> None:
    start(cfg, "project")
    from trace_dist.stages.project import run_project

    run_project(cfg)


def train_command(cfg: RunConfig, task_name: str | None, mask_file: str | None) -> None:
    start(cfg, "train", task_name=task_name, mask_file=mask_file)
    from trace_dist.stages.train import run_train

    run_train(cfg, task_name, mask_file)


def continual_command(cfg: RunConfig) -> None:
    start(cfg, "continual")
    _check_examples(cfg)
    from trace_dist.stages.continual import run_continual

    run_continual(cfg)


def eval_command(cfg: RunConfig, bank_folder: str | None) -> None:
    start(cfg, "eval", bank_folder=bank_folder)
    from trace_dist.stages.evaluate import run_evaluate

    print_scores(run_evaluate(cfg, bank_folder))


def print_scores(scores: Mapping[str, float]) -> None:
    """Print a table of scores, on one rank."""
    if dist.is_main():
        table = Table("set", "score")
        for name, value in scores.items():
            table.add_row(name, f"{value:.2f}")
        print_table(table, markup=False)


def report_command(cfg: RunConfig, picture: str | None = None) -> None:
    take_folder(cfg)
    say_report(_as_run(cfg), picture)


def _as_run(cfg: RunConfig) -> RunConfig:
    """The configuration that a run folder has kept, which says what its results are of; the given one where there is none."""
    from trace_dist.cli.parser import parse, run_config

    path = cfg.folder.config
    if not path.is_file():
        return cfg
    if others := changed(cfg):
        logger.warning(
            "report: shows the run as %s says, which has other values of %s", path, ", ".join(others)
        )
    kept = run_config(parse(["report", "--config", str(path)])["report"])
    return replace(kept, run_dir=cfg.run_dir)


def say_report(cfg: RunConfig, picture: str | None = None) -> None:
    """Write the report of a run, and print its scores."""
    from trace_dist.report import summary_table
    from trace_dist.stages.report import run_report

    results = run_report(cfg, picture)
    print_table(summary_table(results), least_width=100)
    print(f"report: {cfg.folder.report}")
    if picture is not None:
        print(f"picture: {picture}")


RUN: dict[str, Any] = {
    "run": run_command,
    "learn": learn_command,
    "consolidate": consolidate_command,
    "base": base_command,
    "probe": probe_command,
    "project": project_command,
    "train": train_command,
    "continual": continual_command,
    "eval": eval_command,
    "report": report_command,
}
"""Command -> what it does, given a configuration and the command's own arguments."""
