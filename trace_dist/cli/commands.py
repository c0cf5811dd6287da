"""What each command does: a few lines over the stages below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trace_dist.cli.parser import run_config
from trace_dist.cli.start import start, take_folder
from trace_dist.config import RunConfig
from trace_dist.utils import dist
from trace_dist.utils.files import write_json


def run_command(cfg: RunConfig) -> None:
    start(cfg, "run")  # before the slow imports: it may refuse
    from trace_dist.cli.pipeline import run_pipeline

    run_pipeline(cfg)


def base_command(cfg: RunConfig, which: str | None) -> None:
    from trace_dist.train.bases import prepare_base

    if which not in (None, "target", "proxy"):
        raise ValueError(f"which={which!r}: must be target or proxy; leave it out for both")
    start(cfg, "base", which=which)
    for role, model in (("target", cfg.target), ("proxy", cfg.proxy)):
        if model is not None and which in (None, role):
            prepare_base(model, cfg, role)


def probe_command(cfg: RunConfig) -> None:
    from trace_dist.probe.probe import run_probe

    start(cfg, "probe")
    run_probe(cfg)


def project_command(cfg: RunConfig) -> None:
    from trace_dist.probe.project import run_project

    start(cfg, "project")
    run_project(cfg)


def train_command(cfg: RunConfig, task_name: str | None, mask_file: str | None) -> None:
    from trace_dist.continual.single_task import run_train

    start(cfg, "train", task_name=task_name, mask_file=mask_file)
    run_train(cfg, task_name, mask_file)


def continual_command(cfg: RunConfig) -> None:
    from trace_dist.continual.driver import run_continual

    start(cfg, "continual")
    run_continual(cfg)


def eval_command(cfg: RunConfig, bank_folder: str | None) -> None:
    from trace_dist.continual.single_task import run_eval

    start(cfg, "eval", bank_folder=bank_folder)
    scores = run_eval(cfg, bank_folder)
    if dist.is_main():
        table = Table("set", "score")
        for name, value in scores.items():
            table.add_row(name, f"{value:.2f}")
        Console().print(table)


def memory_command(values: Any) -> None:
    if values.action != "measure":
        from trace_dist.cli.memory import run_action

        run_action(values.action, values[values.action])
        return
    from trace_dist.continual.memory import run_memory

    cfg = run_config(values.measure)
    start(cfg, "memory measure")
    run_memory(cfg)


def report_command(cfg: RunConfig, picture: str | None = None) -> None:
    from trace_dist.report import render_png, summary_table, write_report
    from trace_dist.report.collect import collect_results

    results = collect_results(cfg)
    folder = Path(cfg.run_dir)
    take_folder(cfg)
    write_json(folder / "results.json", results)
    page = write_report(results, folder / "report.html")
    Console(width=max(100, Console().width)).print(summary_table(results))
    print(f"report: {page}")
    if picture is not None:
        print(f"picture: {render_png(results, Path(picture))}")


def mask_command(values: Any) -> None:
    from trace_dist.masks.format import Mask
    from trace_dist.masks.ops import combine

    arguments = values[values.action]
    if values.action == "combine":
        combine(Mask.load(arguments.left), Mask.load(arguments.right), arguments.operation).save(
            arguments.out
        )
        return
    mask = Mask.load(arguments.file)
    table = Table("tensor", "units", "density")
    for name in mask.layouts:
        table.add_row(name, str(len(mask.units.get(name, ()))), f"{mask.tensor_density(name):.4f}")
    Console().print(table)
    print(
        f"{mask.granularity} mask, density {mask.density:.5f}, {mask.num_entries} entries, {json.dumps(dict(mask.meta))}"
    )


def bank_command(values: Any) -> None:
    from trace_dist.cli.bank_commands import run_action

    run_action(values.action, values[values.action])


def bench_command(values: Any) -> None:
    from trace_dist.cli import bench

    bench.run_benchmark(values.action, values[values.action])
