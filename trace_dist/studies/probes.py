"""Dense warm starts of target and proxy, which several arms read."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from trace_dist.config import ProbeConfig
from trace_dist.data.batches import Batches
from trace_dist.data.encoding import pad_id
from trace_dist.masks.units import UnitLayout
from trace_dist.probe.importance import Trace
from trace_dist.probe.learning import Learning, chance_loss
from trace_dist.probe.warm_start import warm_start
from trace_dist.studies.heldout import held_out
from trace_dist.studies.lab import EVAL_BATCH, Case, Lab, Small, on_device
from trace_dist.train.workbench import Stream
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


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
            stream, heldout = self._lab.parts(case.task, small.bench)
            probe, seed = self._lab.study.proxy_probe or self._lab.cfg.probe, self._lab.cfg.seed + case.seed
            batches = small.bench.batches([stream], probe.batch_size, seed=seed)
            with on_device(small.module):
                trace = self._warm(small.module, small.layouts, batches, stream, probe)
                return replace(trace, learning=self._learning(small, trace, stream, heldout))

        return self._once(("proxy", case), make)

    def _learning(self, small: Small, trace: Trace, stream: Stream, heldout: Stream) -> Learning:
        """What the proxy has learned; its cost is the study's, not the probe's."""
        meter, begin = self._lab.meter, time.perf_counter()
        flops, module, rows = meter.flops, small.module.eval(), heldout.encoded.to_list()

        def loss() -> float:
            return held_out(module.forward, rows, pad_id(small.bench.tokenizer), EVAL_BATCH).loss

        losses = [loss()]
        tuned = {name: module.get_parameter(name) for name in trace.update}
        before = {name: parameter.detach().clone() for name, parameter in tuned.items()}
        with torch.no_grad():
            for name, update in trace.update.items():
                tuned[name].add_(update.to(tuned[name].device))
            losses.append(loss())
            for name, parameter in tuned.items():
                parameter.copy_(before[name])
        chance = chance_loss(stream.encoded, heldout.encoded)
        found = Learning(losses[0], losses[1], chance, len(rows))
        said = logger.info if found.is_learned(self._lab.cfg.probe.margin) else logger.warning
        said("probe %s: the proxy's %s", stream.task.name, found)
        meter.flops = flops
        meter.reused_s -= time.perf_counter() - begin
        return found

    def _once(self, key: object, make: Callable[[], Trace]) -> Trace:
        """The last trace is kept, since several arms read it; each takes four times the weights that may be masked."""
        if self._kept is not None and self._kept.key == key:
            self._lab.meter.flops += self._kept.flops
            self._lab.meter.reused_s += self._kept.seconds
            return self._kept.trace
        meter, begin = self._lab.meter, time.perf_counter()
        self._kept, flops, reused = None, meter.flops, meter.reused_s
        trace = make()
        seconds = time.perf_counter() - begin + meter.reused_s - reused
        self._kept = Kept(key, trace, meter.flops - flops, seconds)
        return trace

    @property
    def learning(self) -> dict[str, Any] | None:
        """What the proxy has learned of the task, where the trace that is kept is its; JSON-ready."""
        found = self._kept.trace.learning if self._kept is not None else None
        return None if found is None else found.to_json()

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
        with on_device(module):
            try:
                return warm_start(
                    module, list(layouts), batches, probe, train, dtype, f"probe {stream.task.name}"
                )
            finally:
                for parameter in module.parameters():
                    parameter.requires_grad_(False)
                    parameter.grad = None
