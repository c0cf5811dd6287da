"""An accelerator without values: torch's ``meta`` device, on which forward, backward and optimizer run and nothing is computed.

It tells what a GPU would be asked: how often the host waits for it, and how many kernels are launched. A value that the host asks
for is counted, and is 1. Operands on two devices are an error, as on a GPU.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from trace_dist.profiling.simulation.rank import META, deepspeed_on_meta, own_kernels
from trace_dist.sharding import gloo, zero3
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.comm import Comm
from trace_dist.sharding.prepared import PreparedModel
from trace_dist.utils import dist

OURS = ("trace_dist", "trace_kernels")
aten = torch.ops.aten
DATA_DEPENDENT = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.equal.default,
    aten.bincount.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}
FREE = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}
"""Operations without a kernel, beside views."""


class Count(TorchDispatchMode):
    """Counts, inside the block, by whose code: ours, or a library's.

    Attributes:
        waits: (who, operation) -> how often the host waited for the accelerator.
        launches: who -> kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()

    def clear(self) -> None:
        """Begin anew."""
        self.waits.clear()
        self.launches.clear()

    def waited(self, *who: str) -> int:
        """Waits that some packages caused."""
        return sum(number for (by, _), number in self.waits.items() if by.startswith(who))

    def launched(self, *who: str) -> int:
        """Launches of some packages or modules."""
        return sum(number for by, number in self.launches.items() if by.startswith(who))

    def __enter__(self) -> Count:
        counting.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        counting.pop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        devices = {each.device.type for each in tensors}
        name = func._opname
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            self.waits[caller(), name] += 1
            return torch.ones((), dtype=args[0].dtype).item()
        if func in COPIES:
            there = kwargs["device"] if kwargs.get("device") is not None else args[0].device
            here = args[1].device if func is aten.copy_.default else args[0].device
            blocking = not (
                kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))
            )
            if "meta" in (torch.device(there).type, here.type) and torch.device(there).type != here.type:
                # Pageable memory is read before an asynchronous copy returns, but not written.
                if blocking or here.type == "meta":
                    self.waits[caller(), f"{name} {here.type} to {torch.device(there).type}"] += 1
                self.launches[caller()] += 1
                if here.type != "meta":
                    return func(*args, **kwargs)
                if func is aten.copy_.default:
                    return args[0].fill_(1)
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif devices == {"meta", "cpu"} and any(each.dim() and not each.is_meta for each in tensors):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found meta and cpu")
        is_index = func in (aten.index.Tensor, aten.index_put_.default)
        by_bool = is_index and any(each is not None and each.dtype == torch.bool for each in args[1])
        if "meta" in devices and (func in DATA_DEPENDENT or by_bool):
            raise RuntimeError(f"{func}: a GPU would be waited for: how many there are is in its memory")
        result = func(*args, **kwargs)
        found = [each for each in tree_flatten(result)[0] if isinstance(each, Tensor)]
        if any(each.is_meta for each in [*tensors, *found]) and not (func in FREE or func.is_view):
            self.launches[caller()] += name != "detach"
        return result


counting: list[Count] = []
"""Those that count at this moment."""


def launch(*_: Any, **__: Any) -> None:
    """A kernel of ours, or a collective."""
    for count in counting:
        count.launches[caller()] += 1


def caller() -> str:
    """Whose code asked: of the innermost frame outside torch our module or a library; "backward" for autograd's own."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        module = frame.f_globals.get("__name__", "")
        package = module.split(".")[0]
        if package not in ("torch", __name__.split(".")[0]) and "torch" not in path.parts:
            if frame.f_code.co_name == "run_backward":
                return "backward"
            return module if package in OURS else package
        frame = frame.f_back  # type: ignore[assignment]
    return "nobody"


class Absent(Comm):
    """Rank 0 of several, of whom the others are not there: what they send has no values anyway."""

    def __init__(self, world: int) -> None:
        self._world = world

    @property
    def rank(self) -> int:
        return 0

    @property
    def world(self) -> int:
        return self._world

    def open(self) -> None:
        """Nothing."""

    def all_to_all(
        self, received: Tensor, sent: Tensor, receive_sizes: list[int], send_sizes: list[int]
    ) -> Any:
        assert len(sent) == sum(send_sizes)
        assert len(received) == sum(receive_sizes)
        launch()
        return SimpleNamespace(wait=lambda: None, is_completed=lambda: False)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        return list(flags)

    def all_gather(self, mine: Tensor, sizes: list[int]) -> Tensor:
        launch()
        return mine.new_empty(sum(sizes))

    def sum(self, tensor: Tensor) -> Tensor:
        launch()
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        launch()
        return tensor

    def objects(self, value: Any) -> list[Any]:
        return [value] * self._world


@contextmanager
def meta_gpu() -> Iterator[None]:
    """Inside the block this rank's device is ``meta``, and our kernels are launched there: a ``Count`` counts them."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(dist, "local_device", lambda: META))
        own_kernels(stack, launch)
        yield


class ManyRanks(PreparedModel):
    """A model that every one of ``world`` ranks holds whole, seen from the first."""

    def __init__(self, module: nn.Module, world: int) -> None:
        super().__init__(module)
        self.comm = Absent(world)
        self.rank, self.world = 0, world


@contextmanager
def meta_zero3(world: int) -> Iterator[Any]:
    """Inside the block DeepSpeed takes the ``meta`` device for its accelerator, and torch's fake process group for all ranks.

    Gives a function that shards a model. What DeepSpeed asks the other ranks while it learns the order of modules is left out.
    """
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world)}
    td.init_process_group("cpu:fake,meta:fake", rank=0, world_size=world, store=FakeStore())
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with (
        ExitStack() as stack,
        patch.object(gloo, "all_gather", td.all_gather_into_tensor),
        patch.object(dist, "world_size", lambda: 1),  # nobody is there to agree with
        patch.object(zero3, "check_cut"),  # by that world size
    ):
        stack.callback(dist.close)
        deepspeed_on_meta(stack)

        def shard(module: nn.Module) -> ShardedModel:
            model = zero3.Zero3Model(module, 500)
            model.comm, model.world = Absent(world), world
            return model

        yield shard
