"""Writes down what a program on the ``meta`` device asks of its accelerator, and counts the bytes that are alive there.

Every operator passes through torch's dispatcher, where its work is counted: the operations of products by the formulas of
torch's ``FlopCounterMode``, the bytes that it reads and writes from its operands, what a collective sends by ``profiling.wire``.
Storages are counted from birth to death, as in ``profiling.activations``. Our own kernels are launched by the code itself, and
told apart by ``kernels``. What a model asks of values between the beginning of forward and the end of backward, as experts ask
which tokens are theirs, is answered by ``utils.meta_values``, and the host waits for it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from trace_dist.profiling.simulation.calls import Call, Shape
from trace_dist.profiling.simulation.events import COMPUTE, HOSTS, Event, Work
from trace_dist.profiling.simulation.kernels import touched_bytes
from trace_dist.profiling.stand_ins import grouped_flops, grouped_product
from trace_dist.profiling.wire import group_size, sent_by
from trace_dist.utils.meta_values import MetaValues, written_by

aten = torch.ops.aten
_FREE = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten._unsafe_view.default,  # of a product's result: nothing is copied, though it is not called a view
)
_INDEXING = (aten.index.Tensor, aten.index_put_.default)
"""Of a size that depends on values where an index is boolean."""
_COPIES = (aten._to_copy.default, aten.copy_.default)
_PICKS = (
    *(aten.index.Tensor, aten.index_select.default, aten.embedding.default),
    *(aten.gather.default, aten.take.default),
)
_PUTS = (
    aten.index_put_.default,
    aten.index_add_.default,
    aten.index_copy_.default,
    aten.scatter_add_.default,
)
_OVERWRITES = (aten.copy_.default, aten.fill_.Scalar, aten.zero_.default)
"""Operators that write their first operand and do not read it."""
_COPIED = (
    *("_allgather_base_", "allgather_into_tensor_coalesced_"),
    *("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"),
)
"""Collectives for which gloo copies the whole of what all ranks have."""
_PICKING = ("trace_dist.masks", "trace_dist.sharding", "trace_kernels")
"""Modules that work between a layer's gradient and the compact buffer."""
_SHARDING = ("deepspeed", *_PICKING)
"""Modules whose tensors have no values that a model could ask for."""


class Recorder(TorchDispatchMode):
    """Records while it is entered.

    Args:
        on_cpus: whether the accelerator is a CPU: what each operator was called with is kept, and collectives are gloo's.

    Attributes:
        events: since ``clear``.
        alive: bytes of the accelerator's storages now.
        peak: the most since ``clear``.
        stream: to which the program gives work now.
        lane: the process group of a collective that is called now.
        optimizing: whether the optimizer works now.
        calls: ``Event.operator`` -> the call, where they are kept.
    """

    def __init__(self, on_cpus: bool = False) -> None:
        super().__init__()
        self._on_cpus = on_cpus
        self.calls: dict[str, Call] = {}
        self.events: list[Event] = []
        self.alive = self.peak = 0
        self.stream, self.lane, self.optimizing = COMPUTE, "gather", False
        self._storages: dict[int, tuple[Any, int]] = {}  # reference and bytes
        self._last: dict[str, int] = {}
        self._values: MetaValues | None = None  # not None iff the model runs

    def clear(self) -> None:
        """Begin anew; what is alive stays counted."""
        self.events, self.peak, self._last = [], self.alive, {}

    def add(self, kind: Any, stream: str = "", **what: Any) -> int:
        """One more event; its number."""
        event = Event(kind, stream or self.stream, number=len(self.events), **what)
        self.events.append(event)
        if kind in ("kernel", "joins"):
            self._last[event.stream] = event.number
        return event.number

    def last(self, stream: str) -> int:
        """Number of the last event of a stream; -1 without one."""
        return self._last.get(stream, -1)

    def joins(self, stream: str, after: int = -1, target: str = "") -> None:
        """A stream waits for an event."""
        if after >= 0:
            self.add("joins", stream, after=after, target=target)

    def host_waits(self, after: int = -1, target: str = "") -> None:
        """The host waits for an event, or for all that a stream has been given."""
        self.add("host_waits", after=after, target=target or self.stream)

    def host_works(self, num_bytes: int) -> None:
        """The host computes, on so many bytes of its memory."""
        self.add("host_works", num_bytes=num_bytes)

    def hook(self) -> None:
        """The sharding library fetches or releases a module."""
        self.add("hook")

    def mark(self, phase: str) -> None:
        """A phase begins."""
        self.optimizing = phase == "optimizer"
        self._values = None if self.optimizing else self._values or MetaValues()
        self.add("mark", name=phase)

    def attention(self, flops: int, num_bytes: int) -> None:
        """A fused attention kernel."""
        self.add("kernel", name="attention", flops=flops, num_bytes=num_bytes)

    def kernel(self, num_bytes: float, work: Work = "other", operator: str = "") -> None:
        """Another kernel."""
        name = "optimizer" if self.optimizing else work
        self.add("kernel", name=name, num_bytes=num_bytes, operator=operator)

    @contextmanager
    def on_lane(self, lane: str) -> Iterator[None]:
        """Collectives inside the block run in a process group."""
        before, self.lane = self.lane, lane
        try:
            yield
        finally:
            self.lane = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with the local tensors comes here again
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            self.host_waits()
            known = self._known(args[0])
            return _answer(args[0], _caller()) if known is None else known.item()
        given = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        if func.namespace == "c10d":
            result = func(*args, **kwargs)
            self._collective(func, args)
            if self._values is not None:
                self._values.forget(given)
            return result
        on_meta = any(each.is_meta for each in given)
        if func in _COPIES and on_meta:
            fetched = self._fetched(func, args, kwargs)
            if fetched is not None:
                return fetched
        asks = on_meta and _asks_values(func, args)
        if asks and self._values is None:
            raise RuntimeError(f"{func}: asks for values that a rank without values does not have")
        result = self._run(func, args, kwargs)
        made = [each for each in tree_iter(result) if isinstance(each, Tensor) and each.is_meta]
        for tensor in made:
            self._count(tensor.untyped_storage())
        if made and given and not on_meta and func in _COPIES:
            self._crossed(made[0])
        elif (on_meta or made) and not (func in _FREE or func.is_view or func._opname == "detach"):
            self._operator(func, args, kwargs, result, given, made)
        if asks:
            self.host_waits()
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operator gives; values are followed where a model asks for some."""
        if func is aten._grouped_mm.default and args[0].is_meta:
            return grouped_product(*args, **kwargs)
        if self._values is None:
            return func(*args, **kwargs)
        if not _caller().startswith(_SHARDING):
            return self._values.run(func, args, kwargs)
        self._values.forget(written_by(func, args, kwargs))
        return func(*args, **kwargs)

    def _known(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor, where they follow from shapes and constants."""
        if self._values is None or _caller().startswith(_SHARDING):
            return None
        return self._values.of(tensor)

    def _operator(
        self, func: Any, args: Any, kwargs: Any, result: Any, given: list[Tensor], made: list[Tensor]
    ) -> None:
        formula = flop_registry.get(func._overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
        if func is aten._grouped_mm.default:
            flops = grouped_flops(*args[:2])
        num_bytes, operator = _moved(func, given, made), self._kept(func, args, kwargs)
        if flops:
            wide = made[0].dtype not in (torch.bfloat16, torch.float16)
            self.add("kernel", name="matmul", flops=flops, num_bytes=num_bytes, wide=wide, operator=operator)
        else:
            self.kernel(num_bytes, "pick" if _caller().startswith(_PICKING) else "other", operator)

    def _kept(self, func: Any, args: Any, kwargs: Any) -> str:
        """Keep a call, where that is wanted; its key."""
        if not self._on_cpus:
            return ""
        call = Call.of(func, args, kwargs)
        return self.calls.setdefault(call.key, call).key

    def _collective(self, func: Any, args: tuple[Any, ...]) -> None:
        name, num_bytes = sent_by(func, args)
        tensors = [each for each in tree_iter(args) if isinstance(each, Tensor)]
        lane = self.lane if any(each.is_meta for each in tensors) else HOSTS
        largest = max(tensors, key=lambda each: each.nbytes, default=None)
        size = 0 if largest is None else largest.nbytes
        operator = ""
        if self._on_cpus and largest is not None:
            operator = f"{name} {largest.dtype} {size}"
            self.calls.setdefault(operator, Call(name, (Shape.of(largest), {})))
        what: dict[str, Any] = {"num_bytes": num_bytes, "lane": lane, "size": size, "operator": operator}
        number = self.add("collective", name=name, ranks=group_size(args), **what)
        self.peak = max(self.peak, self.alive + self.copied(self.events[number]))

    def copied(self, collective: Event) -> int:
        """Bytes that gloo copies for it; none on other accelerators than CPUs."""
        return collective.size if self._on_cpus and collective.name in _COPIED else 0

    def _fetched(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a copy to the CPU, for which the host waits; None for any other."""
        if func is aten.copy_.default:
            target, source = args[:2]
            if target.is_meta or not source.is_meta:
                return None
            self._crossed(source)
            self.host_waits()
            known = self._known(source)
            return target.fill_(1) if known is None else target.copy_(known)
        if not args[0].is_meta or torch.device(kwargs.get("device") or args[0].device).type == "meta":
            return None
        self._crossed(args[0])
        if not kwargs.get("non_blocking"):
            self.host_waits()
        known, dtype = self._known(args[0]), kwargs.get("dtype") or args[0].dtype
        return torch.ones(args[0].shape, dtype=dtype) if known is None else known.to(dtype, copy=True)

    def _crossed(self, tensor: Tensor) -> None:
        self.add("kernel", name="bus", num_bytes=tensor.nbytes)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return

        def died(_: object) -> None:
            self.alive -= self._storages.pop(key)[1]

        self._storages[key] = weakref.ref(storage, died), storage.nbytes()
        self.grow(storage.nbytes())

    def grow(self, num_bytes: int) -> None:
        """Memory is taken, or given back where the number is negative; also such as no tensor tells of."""
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)

    def resized(self, tensor: Tensor) -> None:
        """The storage of a tensor has been given another size, of which no operator tells."""
        storage = tensor.untyped_storage()
        self._count(storage)
        reference, before = self._storages[storage._cdata]
        self._storages[storage._cdata] = reference, storage.nbytes()
        self.grow(storage.nbytes() - before)


def _answer(asked: Tensor, caller: str) -> Any:
    """What the host reads: 1, or yes; to DeepSpeed, which asks for infinite gradients, no."""
    return (torch.zeros if caller.startswith("deepspeed") else torch.ones)((), dtype=asked.dtype).item()


def _asks_values(func: Any, args: Any) -> bool:
    if func in _INDEXING:
        return any(each is not None and each.dtype == torch.bool for each in args[1])
    return torch.Tag.dynamic_output_shape in func.tags or func is aten.equal.default


def _moved(func: Any, given: list[Tensor], made: list[Tensor]) -> float:
    """Bytes that an operator reads and writes: each operand once; of a tensor that is picked from, what is picked."""
    there = list({id(each): each for each in given if each.is_meta}.values())
    if func in _PICKS and made:
        source, picked = there[0], made[0]
        block = _contiguous(func, source, picked)
        touched = touched_bytes(source.numel(), source.element_size(), picked.numel(), block)
        return touched + picked.nbytes + sum(map(_size, there[1:]))
    written = made or there  # an operator on lists of tensors gives nothing back
    read = there[1:] if func in _OVERWRITES else there
    if func in _PUTS:  # the target is touched where something is put
        put = min(map(_size, there[1:]), default=0)
        return sum(map(_size, there[1:])) + 2.0 * put
    return float(sum(map(_size, read)) + sum(map(_size, written)))


def _contiguous(func: Any, source: Tensor, picked: Tensor) -> int:
    """Elements that are picked together: those of the dimensions behind the ones that are indexed."""
    if func in (aten.gather.default, aten.take.default):
        return 1
    kept = 1
    for ours, theirs in zip(reversed(source.shape), reversed(picked.shape), strict=False):
        if ours != theirs:
            break
        kept *= ours
    return max(1, kept)


def _size(tensor: Tensor) -> int:
    """Bytes; of a tensor that repeats its elements, those that it repeats."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _caller() -> str:
    """The module of the innermost frame that is not torch's or this file's; ``autograd`` for what that does by itself."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "_engine_run_backward":
            return "autograd"
        if not module.startswith(("torch", "typing", "contextlib")) and module != __name__:
            return module
        frame = frame.f_back  # type: ignore[assignment]
    return ""
