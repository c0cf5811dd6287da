"""The first of many ranks, of which the others are not there: ``meta`` tensors, torch's fake process group, DeepSpeed on both.

The program that runs on it is the one that trains: ``shard``, ``MaskedAdamW``, DeepSpeed's hooks, streams and optimizer. What
is replaced is the accelerator below it (device, streams, Triton's launches), fused attention, and what hosts say to each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as td
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from trace_dist.optim.masked_adamw import MaskedAdamW
from trace_dist.optim.offload import HostEntries, Offload
from trace_dist.profiling.simulation.events import HOSTS
from trace_dist.profiling.simulation.kernels import adamw_bytes, launched_bytes
from trace_dist.profiling.simulation.recorder import Recorder
from trace_dist.profiling.simulation.streams import Streams
from trace_dist.profiling.stand_ins import replace_attention
from trace_dist.sharding import compaction, zero3
from trace_dist.train.cross_entropy import chunks_on_meta
from trace_dist.utils import dist

META = torch.device("meta")
_LAUNCHING = (
    *("adamw_batch", "compact", "delta_swap", "gap_gather"),
    *("masked_adamw", "masked_adamw_8bit", "unit_reduce"),
)
"""Modules of ``trace_kernels`` that launch kernels."""
_CHOOSING = ("trace_kernels.dispatch", "trace_kernels.gap_gather", "trace_dist.optim.batches")
"""Modules that ask whether Triton serves a tensor."""
_COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all_single", "broadcast"),
    *("irecv", "isend", "reduce_scatter_tensor"),
)


class Ongoing:
    """A collective that somebody will wait for.

    Args:
        recorder: of the rank.
        numbers: of its events.
        copied: bytes of the copies that live as long as nobody has waited.
    """

    def __init__(self, recorder: Recorder, numbers: list[int], copied: int) -> None:
        self._recorder, self._numbers, self._copied = recorder, numbers, copied
        recorder.grow(copied)

    def wait(self, *_: Any, **__: Any) -> bool:
        """The present stream waits for its end."""
        self._recorder.grow(-self._copied)
        self._copied = 0
        for number in self._numbers:
            self._recorder.joins(self._recorder.stream, number)
        return True

    def is_completed(self) -> bool:
        """Not as far as anybody knows."""
        return False


def _told(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that is recorded, with the process group that it runs in."""

    def call(*args: Any, **kwargs: Any) -> Any:
        first = len(recorder.events)
        with recorder.on_lane(dist.lane_of(kwargs.get("group"))):
            work = function(*args, **kwargs)
        numbers = [e.number for e in recorder.events[first:] if e.kind == "collective" and e.lane != HOSTS]
        if not numbers:
            return work
        ongoing = Ongoing(recorder, numbers, sum(recorder.copied(recorder.events[each]) for each in numbers))
        if work is None:
            ongoing.wait()
            return None
        return ongoing

    return call


def _replaced(stack: ExitStack, owner: Any, replacements: Mapping[str, Any]) -> None:
    for name, replacement in replacements.items():
        stack.enter_context(patch.object(owner, name, replacement))


def own_kernels(stack: ExitStack, launch: Callable[..., None]) -> None:
    """Until the stack closes our kernels are launched for tensors on ``meta``, by ``launch``."""

    def use_triton(impl: str, *tensors: Tensor) -> bool:
        return impl == "auto" and tensors[0].is_meta

    for name in _CHOOSING:
        _replaced(stack, import_module(name), {"use_triton": use_triton})
    for name in _LAUNCHING:  # the package gives functions of some of these names
        _replaced(stack, import_module(f"trace_kernels.{name}"), {"launch": launch})


def _recorded_kernels(stack: ExitStack, recorder: Recorder) -> None:
    """Our kernels are launched, and do nothing."""

    def launch(kernel: Any, _: int, __: torch.device, /, *args: Any, **___: Any) -> None:
        recorder.kernel(launched_bytes(kernel, args), "pick")

    def run(self: Any, *_: Any) -> None:
        recorder.kernel(adamw_bytes(self._members))

    own_kernels(stack, launch)
    # The table of such a launch has addresses, and tells nothing of the tensors.
    _replaced(stack, import_module("trace_kernels.adamw_batch")._Launch, {"run": run})


def _offload(stack: ExitStack, recorder: Recorder) -> None:
    """The host tells when it updates entries whose states it keeps: three of them are read and written, the gradient is read."""
    taken = Offload.step

    def step(self: Offload, supports: list[Any], update: Callable[[Any, Any], None]) -> None:
        def told(support: Any, entries: HostEntries) -> None:
            update(support, entries)
            recorder.host_works((2 * 3 * 4 + 4) * len(entries.grad) + entries.values.nbytes)

        taken(self, supports, told)

    _replaced(stack, Offload, {"step": step})


def _hosts(stack: ExitStack, world: int) -> None:
    """What the hosts say to each other: all say what this one does."""
    said = {"gather_objects": lambda value: [value] * world, "broadcast_object": lambda value: value}
    _replaced(stack, dist, {"local_device": lambda: META, **said})
    _replaced(stack, MaskedAdamW, {"_serve": lambda _: None})  # to ranks that are not there


def deepspeed_on_meta(stack: ExitStack) -> None:
    """Until the stack closes DeepSpeed takes ``meta`` for its accelerator, and asks other ranks nothing."""
    import deepspeed.comm.comm as comm
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import linear, partitioned_param_coordinator
    from deepspeed.utils import groups

    comm.cdb = None  # of another job in this process
    _replaced(stack, groups, dict.fromkeys(("_WORLD_GROUP", "mesh_device"), None))
    kind = type(get_accelerator())
    _replaced(
        stack,
        kind,
        {"device_name": lambda *_: "meta", "current_device_name": lambda *_: "meta"},
    )
    # The order of modules is compared over ranks; products ask the device for autocast, which meta has none of.
    _replaced(stack, partitioned_param_coordinator, {"assert_ints_same_as_other_ranks": lambda _: None})
    cpu = SimpleNamespace(device_name=lambda: "cpu")
    _replaced(stack, linear, {"get_accelerator": lambda: cpu})


def _recorded_fsdp2(stack: ExitStack, recorder: Recorder, streams: Streams) -> None:
    """FSDP2 takes ``meta`` for its accelerator, and tells when it frees or fills a gathered weight."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

    handle = SimpleNamespace(
        Stream=streams.make,
        Event=streams.event,
        stream=streams.on,
        current_stream=streams.current,
        current_device=lambda: 0,
        device_count=lambda: 1,
        set_device=lambda _: None,
        is_initialized=lambda: True,
    )
    stack.enter_context(patch.object(torch, META.type, handle, create=True))

    def told(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def call(tensor: Tensor) -> None:
            function(tensor)
            recorder.resized(tensor)

        return call

    filled, freed = told(_fsdp_param.alloc_storage), told(_fsdp_param.free_storage)
    _replaced(stack, _fsdp_param, {"alloc_storage": filled, "free_storage": freed})
    _replaced(stack, _fsdp_param_group, {"alloc_storage": filled})
    _replaced(stack, _fsdp_param_group.FSDPParamGroup, {"_validate_no_meta_params": lambda _: None})


def _recorded_deepspeed(stack: ExitStack, recorder: Recorder, streams: Streams, synchronous: bool) -> None:
    """DeepSpeed tells when it fetches modules, and has streams unless its accelerator is synchronous."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import partitioned_param_coordinator

    deepspeed_on_meta(stack)
    if not synchronous:
        made = {"Stream": property(lambda _: streams.make), "Event": property(lambda _: streams.event)}
        used = {
            "stream": lambda _, stream: streams.on(stream),
            "current_stream": lambda _, *__: streams.current(),
            "default_stream": lambda _, *__: streams.default(),
            "synchronize": lambda _, *__: streams.synchronize(),
            "is_synchronized_device": lambda _: False,
        }
        _replaced(stack, type(get_accelerator()), made | used)
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    for name in ("fetch_sub_module", "release_sub_module"):
        _replaced(stack, coordinator, {name: _hooked(recorder, getattr(coordinator, name))})


def _hooked(recorder: Recorder, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        recorder.hook()
        return function(*args, **kwargs)

    return call


@contextmanager
def simulated_rank(world: int, synchronous: bool = False) -> Iterator[Recorder]:
    """Inside the block this process is the first of ``world`` ranks, each with an accelerator of its own.

    Args:
        world: ranks.
        synchronous: whether the accelerator is one that the host waits for at each operator: a CPU. Weights are then
            gathered by messages, as over gloo, and logits upcast in small chunks. What operators are called with is kept, and
            gloo's copies are counted.

    Raises:
        ValueError: a process group exists.
    """
    if td.is_initialized():
        raise ValueError("simulate: this process is a rank of a job; start it without a launcher")
    recorder = Recorder(on_cpus=synchronous)
    with ExitStack() as stack:
        stack.enter_context(
            patch.dict(os.environ, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)})
        )
        _hosts(stack, world)
        td.init_process_group("cpu:fake,meta:fake", rank=0, world_size=world, store=FakeStore())
        stack.callback(dist.close)
        _replaced(stack, td, {name: _told(recorder, getattr(td, name)) for name in _COLLECTIVES})
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        streams = Streams(recorder)
        _recorded_deepspeed(stack, recorder, streams, synchronous)
        _recorded_fsdp2(stack, recorder, streams)
        _recorded_kernels(stack, recorder)
        _offload(stack, recorder)
        _replaced(stack, Tensor, {"record_stream": lambda *_: None})
        _replaced(
            stack, import_module("torch.optim.adam"), {"_device_dtype_check_for_fused": lambda *_: None}
        )
        _replaced(stack, zero3, {"gathers_by_messages": lambda: synchronous})
        if synchronous:
            _replaced(stack, compaction, {"worth_sharing": lambda *_: False})
        stack.enter_context(chunks_on_meta("cpu" if synchronous else "cuda"))
        stack.callback(replace_attention(recorder.attention))
        with recorder:
            yield recorder
