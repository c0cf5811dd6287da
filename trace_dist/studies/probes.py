"""Dense warm starts of target and proxy, which several arms read."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from trace_dist.config import ProbeConfig
from trace_dist.data.batches import Batches
from trace_dist.masks.units import UnitLayout
from trace_dist.probe.importance import Trace
from trace_dist.probe.warm_start import warm_start
from trace_dist.studies.lab import Case, Lab
from trace_dist.train.workbench import Stream


class Kept(NamedTuple):
    """A trace, what it is of, and what it cost."""

    key: object
    trace: Trace
    flops: float
    seconds: float


class Probes:
    """Warm starts of a lab's models.

    Args:
        lab: models and data.
    """

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._kept: Kept | None = None

    def target(self, case: Case) -> Trace:
        """What a dense warm start of the target shows of a task."""
        stream = self._lab.stream(case)

        def make() -> Trace:
            batches = self._lab.batches(case, self._lab.cfg.probe.batch_size)
            return self._warm(self._lab.dense, self._lab.layouts, batches, stream, self._lab.cfg.probe)

        return self._once(("target", case), make)

    def general(self, seed: int) -> Trace:
        """The same of the general sets together."""
        bench, probe = self._lab.setting.bench, self._lab.cfg.probe
        if not bench.general:
            raise ValueError(
                "general=[]: an arm compares with general data, and there are none; add some, or leave the arm out"
            )
        batches = bench.batches(bench.general, probe.batch_size, seed=self._lab.cfg.seed + seed)
        self._kept = None
        return self._warm(self._lab.dense, self._lab.layouts, batches, bench.general[0], probe)

    def proxy(self, case: Case) -> Trace:
        """What the proxy shows of a task."""
        small = self._lab.small

        def make() -> Trace:
            stream, _ = self._lab.parts(case.task, small.bench)
            probe, seed = self._lab.study.proxy_probe or self._lab.cfg.probe, self._lab.cfg.seed + case.seed
            batches = small.bench.batches([stream], probe.batch_size, seed=seed)
            return self._warm(small.module, small.layouts, batches, stream, probe)

        return self._once(("proxy", case), make)

    def _once(self, key: object, make: Callable[[], Trace]) -> Trace:
        """The last trace is kept, since several arms read it; each takes four times the weights that may be masked."""
        if self._kept is not None and self._kept.key == key:
            self._lab.meter.flops += self._kept.flops
            self._lab.meter.reused_s += self._kept.seconds
            return self._kept.trace
        self._kept, flops, begin = None, self._lab.meter.flops, time.perf_counter()
        trace = make()
        self._kept = Kept(key, trace, self._lab.meter.flops - flops, time.perf_counter() - begin)
        return trace

    @property
    def warm_losses(self) -> list[float]:
        """Training loss in the first and the last step of the trace that is kept; empty where none is."""
        losses = self._kept.trace.losses if self._kept is not None else []
        return [losses[0][1], losses[-1][1]] if losses else []

    def _warm(
        self,
        module: nn.Module,
        layouts: Mapping[str, UnitLayout],
        batches: Batches,
        stream: Stream,
        probe: ProbeConfig,
    ) -> Trace:
        """A warm start, after which all is frozen again."""
        probe = replace(probe, steps=probe.num_steps(len(stream.encoded)), epochs=None)
        dtype, train = self._lab.cfg.probed.dtype, self._lab.cfg.train
        try:
            return warm_start(
                module, list(layouts), batches, probe, train, dtype, f"probe {stream.task.name}"
            )
        finally:
            for parameter in module.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
