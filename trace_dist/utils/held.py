"""Weights that are gathered once for many forward passes, where they fit, instead of in each pass.

A sharding backend offers it for its model, and who asks a model many things without training it makes use of it. They do not know
each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import nn

from trace_dist.utils import dist
from trace_dist.utils.memory import available_bytes

Hold = Callable[[], AbstractContextManager[bool]]
SHARE = 0.5
"""Of the free memory that held weights may take."""
_OFFERS: WeakKeyDictionary[nn.Module, WeakMethod[Hold]] = WeakKeyDictionary()


def offer(module: nn.Module, hold: Hold) -> None:
    """Let ``held`` use a bound method; neither the module nor the method's object is kept alive by it."""
    _OFFERS[module] = WeakMethod(hold)


@contextmanager
def held(module: nn.Module) -> Iterator[bool]:
    """Hold the weights of a model whole on every rank, where its backend can and they fit. Collective.

    Yields:
        Whether this rank may now run forward passes that other ranks do not run.
    """
    reference = _OFFERS.get(module)
    hold = reference() if reference is not None else None
    if dist.world_size() == 1 or hold is None:
        yield dist.world_size() == 1
        return
    with hold() as alone:
        yield alone


def fits(num_bytes: int) -> bool:
    """Whether every rank has room for that much more, beside as much again. Collective."""
    return dist.max_over_ranks(float(num_bytes > SHARE * free_bytes(dist.local_device()))) == 0


def free_bytes(device: torch.device) -> int:
    """Memory that a rank may still take. A CPU's is shared by all ranks, as if they were on one host."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return available_bytes() // dist.world_size()
