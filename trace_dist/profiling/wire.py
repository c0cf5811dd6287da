"""Bytes that collectives put on the wire, counted where every one of them passes: at torch's c10d operators.

A rank sends, of a collective over W ranks whose operand has n bytes (bandwidth-optimal algorithms; Thakur et al. 2005)::

    all-gather       (W - 1) n          n: this rank's part
    reduce-scatter   (W - 1) / W n      n: the whole
    all-reduce       2 (W - 1) / W n
    all-to-all       n minus what stays
    broadcast        n on the root
    message          n
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trace_dist.utils import dist

_SENT: dict[str, Callable[[int, tuple[Any, ...]], float]] = {
    "_allgather_base_": lambda world, args: (world - 1) * _nbytes(args[1]),
    "allgather_": lambda world, args: (world - 1) * _nbytes(args[1]),
    "allgather_into_tensor_coalesced_": lambda world, args: (world - 1) * _nbytes(args[1]),
    "_reduce_scatter_base_": lambda world, args: (world - 1) / world * _nbytes(args[1]),
    "reduce_scatter_": lambda world, args: (world - 1) / world * _nbytes(args[1]),
    "reduce_scatter_tensor_coalesced_": lambda world, args: (world - 1) / world * _nbytes(args[1]),
    "allreduce_": lambda world, args: 2 * (world - 1) / world * _nbytes(args[0]),
    "allreduce_coalesced_": lambda world, args: 2 * (world - 1) / world * _nbytes(args[0]),
    "alltoall_base_": lambda world, args: _others_share(args[1], args[4], world),
    "broadcast_": lambda world, args: _nbytes(args[0]) if args[2] == dist.rank() else 0,
    "send": lambda world, args: _nbytes(args[0]),
    "recv_": lambda world, args: 0,
    "barrier": lambda world, args: 0,
}


_OF_WEIGHTS = ("gather", "broadcast", "send")


def sent_by(func: Any, args: tuple[Any, ...]) -> tuple[str, float]:
    """The name of a c10d operator, and the bytes that this rank sends when it is called with ``args``.

    Raises:
        ValueError: it is not known.
    """
    name = func._schema.name.removeprefix("c10d::")
    if name not in _SENT:
        raise ValueError(f"collective={name!r}: not known to the counter; add it to profiling/wire.py")
    return name, _SENT[name](group_size(args), args)


def group_size(args: tuple[Any, ...]) -> int:
    """Ranks of the process group among the arguments of a c10d operator; all of them where it is told otherwise."""
    groups = (each for each in args if isinstance(each, torch.ScriptObject))
    return next((td.ProcessGroup.unbox(each).size() for each in groups if _is_group(each)), dist.world_size())


def _is_group(each: torch.ScriptObject) -> bool:
    return each._type().qualified_name().endswith("c10d.ProcessGroup")


class WireCounter(TorchDispatchMode):
    """Counts inside its ``with`` block; ``sent[kind]`` are bytes of this rank by c10d operator.

    Raises:
        ValueError: a collective that it does not know was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, num_bytes = sent_by(func, args)
            self.sent[name] += num_bytes
        return func(*args, **(kwargs or {}))

    @property
    def gathered(self) -> float:
        """Bytes of weights: all-gathers, broadcasts, and messages (``sharding.gloo``)."""
        return sum(count for name, count in self.sent.items() if any(part in name for part in _OF_WEIGHTS))

    @property
    def reduced(self) -> float:
        """Bytes of gradients and norms: reductions and exchanges."""
        return sum(self.sent.values()) - self.gathered


def _tensors(operand: Any) -> Iterator[Tensor]:
    if isinstance(operand, Tensor):
        yield operand
    else:
        for part in operand:
            yield from _tensors(part)


def _nbytes(operand: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(operand))


def _others_share(send: Tensor, splits: list[int], world: int) -> int:
    rows = splits[dist.rank()] if splits else len(send) // world
    return send.nbytes - (rows * send[:1].nbytes if len(send) else 0)
