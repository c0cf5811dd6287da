"""What each command does: a few lines over the stages below."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from trace_dist.cli.lifetime import only_run
from trace_dist.cli.parser import run_config
from trace_dist.config import RunConfig
from trace_dist.utils import dist
from trace_dist.utils.files import write_json, write_text


def _start(cfg: RunConfig, whole_run: bool = False) -> None:
    """Join the job and write the configuration beside the results.

    Args:
        cfg: the configuration of this command.
        whole_run: the stages of a run read the file that lies there, so it is also replaced where only how it runs differs.

    Raises:
        ValueError: too many ranks for the backend, or the folder holds results of another configuration.
    """
    dist.init_distributed()
    if cfg.backend == "single" and dist.world_size() > 1:
        raise ValueError(
            f"backend='single': {dist.world_size()} ranks were started; set --backend zero3, or start one process"
        )
    if not dist.is_main():
        return
    path = Path(cfg.run_dir) / "config.yaml"
    present = json.loads(json.dumps(asdict(cfg)))
    differing = _differing(_read_yaml(path), present) if path.is_file() else ["everything"]
    if differing and path.is_file() and _holds_more_than(path):
        raise ValueError(
            f"run_dir={cfg.run_dir!r}: it holds results made with other values of {', '.join(differing)}; "
            "choose another run_dir, or delete this one"
        )
    if differing or whole_run:
        write_text(path, yaml.safe_dump(present, sort_keys=False))


def _holds_more_than(path: Path) -> bool:
    """Whether any file lies beside this one; a run that failed before it made one may be started with other values."""
    for other in path.parent.rglob("*"):
        hidden = any(part.startswith(".") for part in other.relative_to(path.parent).parts)
        if other.is_file() and other != path and not hidden:
            return True
    return False


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({reason}); restore it or delete the run folder") from None


HOW_IT_RUNS = ("launch", "backend", "continual.methods")
"""Fields that say how a run is carried out, not what it computes: they may differ between its commands."""


def _differing(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Names of the fields whose values differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    names = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}.{key}" if prefix else key
        if name not in HOW_IT_RUNS:
            names += _differing(old.get(key), new.get(key), name)
    return names


def run_command(cfg: RunConfig) -> None:
    with only_run(Path(cfg.run_dir)):
        _start(cfg, whole_run=True)  # before the slow imports: it may refuse
        from trace_dist.cli.pipeline import run_pipeline

        run_pipeline(cfg)


def base_command(cfg: RunConfig, which: str | None) -> None:
    from trace_dist.train.bases import prepare_base

    if which not in (None, "target", "proxy"):
        raise ValueError(f"which={which!r}: must be target or proxy; leave it out for both")
    _start(cfg)
    for role, model in (("target", cfg.target), ("proxy", cfg.proxy)):
        if model is not None and which in (None, role):
            prepare_base(model, cfg, role)


def probe_command(cfg: RunConfig) -> None:
    from trace_dist.probe.probe import run_probe

    _start(cfg)
    if dist.world_size() > 1:
        raise ValueError(
            f"probe: the proxy is probed in one process, but {dist.world_size()} ranks were started; start one"
        )
    run_probe(cfg)


def project_command(cfg: RunConfig) -> None:
    from trace_dist.probe.project import run_project

    _start(cfg)
    run_project(cfg)


def train_command(cfg: RunConfig, task_name: str | None, mask_file: str | None) -> None:
    from trace_dist.continual.single_task import run_train

    _start(cfg)
    run_train(cfg, task_name, mask_file)


def continual_command(cfg: RunConfig) -> None:
    from trace_dist.continual.driver import run_continual

    _start(cfg)
    run_continual(cfg)


def eval_command(cfg: RunConfig, bank_folder: str | None) -> None:
    from trace_dist.continual.single_task import run_eval

    _start(cfg)
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
    _start(cfg)
    run_memory(cfg)


def report_command(cfg: RunConfig, picture: str | None = None) -> None:
    from trace_dist.report import render_png, summary_table, write_report
    from trace_dist.report.collect import collect_results

    results = collect_results(cfg)
    folder = Path(cfg.run_dir)
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
