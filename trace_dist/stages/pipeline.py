"""``trace-dist run``: every stage as the command a user would type, each once; a run that was cut continues.

Stages that touch the sharded target start under the launcher of the config; the others are single processes, several at a
time where the config allows it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from trace_dist.config import RunConfig
from trace_dist.stages import base, continual, memory, probe, project
from trace_dist.stages.display import Display
from trace_dist.stages.running import Running, failure, start_stage, unfinished
from trace_dist.stages.stage import Stage, read_timings
from trace_dist.utils import stopping
from trace_dist.utils.files import write_json
from trace_dist.utils.stopping import Stopped


def stage_groups(cfg: RunConfig) -> list[list[Stage]]:
    """The stages in order; those of one group are independent of each other."""
    target, probed = base.describe(cfg, "target"), probe.describe(cfg)
    launched = [method for method in cfg.continual.methods if continual.runs_on_ranks(cfg, method)]
    alone = [continual.describe(cfg, [name]) for name in cfg.continual.methods if name not in launched]
    masked = [[continual.describe(cfg, launched)]] if launched else []
    if not continual.projects(launched):
        masked.append([project.describe(cfg)])
    states = [memory.describe(cfg)] if cfg.backend == "zero3" else []
    # A proxy that is cut out of the target waits for it.
    together = probe.needs_probe(cfg) and cfg.proxy is not None and cfg.proxy.prune is None
    make = [target, probed] if together else [target]
    first = [make, [probed]] if probe.needs_probe(cfg) else [make]
    return [*first, *masked, [*states, *alone]]


def run_pipeline(cfg: RunConfig, groups: list[list[Stage]]) -> None:
    """Run what is missing.

    Args:
        cfg: the run.
        groups: its stages in order; those of one group are independent of each other.

    Raises:
        ProcessFailed: a stage failed; its own error is printed above.
        Stopped: the run was asked to stop, and its stages have.
    """
    if signal.SIGTERM not in stopping.signals():
        signal.signal(signal.SIGTERM, _on_terminate)
    path = cfg.folder.stages
    timings: dict[str, Any] = {"stages": {}, "wall_seconds": 0.0}
    if path.is_file():
        timings = read_timings(path)
    with Display(stage.name for group in groups for stage in group) as display:
        for stage in {stage.name: stage for group in groups for stage in group if stage.made_before}.values():
            display.line(stage.name, "kept")
        for group in groups:
            begin, before = time.perf_counter(), timings["wall_seconds"]
            for name, seconds in _run_group([stage for stage in group if not stage.done], cfg, display):
                timings["stages"][name] = seconds
                timings["wall_seconds"] = before + time.perf_counter() - begin
                write_json(path, timings)


def _run_group(stages: list[Stage], cfg: RunConfig, display: Display) -> Iterator[tuple[str, float]]:
    """Run independent stages, ``parallel_stages`` at a time; yields the name and the seconds of each that ends."""
    waiting, running = list(stages), list[Running]()
    together = min(len(stages), cfg.launch.parallel_stages)
    try:
        while waiting or running:
            asked = stopping.asked()
            for one in running if asked else []:
                one.ask_to_stop()
            if asked and not running:
                raise Stopped(f"stage {waiting[0].name} has not begun")
            while waiting and not asked and len(running) < together:
                running.append(start_stage(waiting.pop(0), cfg, together))
                display.begin(running[-1].stage.name)
            time.sleep(0.1)
            for one in list(running):
                # Asked first: what a stage tells last is read after its end.
                code, name = one.process.poll(), one.stage.name
                display.show(name, one.events.news())
                if code is None:
                    continue
                running.remove(one)
                one.close()
                if code != 0:
                    display.drop(name)
                    if asked:
                        raise Stopped(f"stage {name} has ended early")
                    one.explain()
                    raise failure(one, code)
                if (lost := unfinished(one)) is not None:
                    display.drop(name)
                    raise lost
                display.end(name, one.seconds)
                yield name, one.seconds
    finally:
        for one in running:
            one.stop()
            one.close()


def _on_terminate(number: int, _: object) -> None:
    """Leave through the ``finally`` blocks, which stop the stages; whoever asks again does not break into them."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)
