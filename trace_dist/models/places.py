"""Where the weights of a model of the caller's lie: on one device, with values, row by row."""

from __future__ import annotations

from collections.abc import Container
from itertools import pairwise
from typing import NoReturn

from torch import Tensor, nn

from trace_dist.models.wrapping import plain_name

_CURE = "load it without device_map, whole and on one device, or shard it: trace_dist.load_sharded"


def refuse_scattered(model: nn.Module) -> None:
    """Raise ValueError where weights lie on several devices, as ``device_map`` spreads and offloads them."""
    devices = {str(parameter.device) for parameter in model.parameters()}
    mapped = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    for places in (devices, mapped):
        if len(places) > 1:
            raise ValueError(f"model: its weights lie on {', '.join(sorted(places))}; {_CURE}")


def refuse_empty(model: nn.Module) -> None:
    """Raise ValueError where weights have no values."""
    name = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if name is not None:
        raise ValueError(f"model: {name!r} has no values (meta device); {_CURE}")


def refuse_overlapping(model: nn.Module, copied: Container[str]) -> None:
    """Raise ValueError where a parameter lies in one memory with another, as ``a.weight.data = b.weight.data`` makes them, and
    copies of it are written over it: what was done to the other would be lost. Two names of one parameter are another matter."""
    for names in _overlapping(model):
        if any(plain_name(name) in copied for name in names):
            _refuse(*names)


def _overlapping(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of parameters in one memory."""
    places = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for name, p in model.named_parameters()
        if type(p.data) is Tensor and not p.is_meta and _is_dense(p)
    )
    return [(name, other) for (_, stop, name), (start, _, other) in pairwise(places) if start < stop]


def _refuse(*names: str) -> NoReturn:
    first, second = sorted(map(plain_name, names))
    raise ValueError(
        f"model: {first!r} and {second!r} are two parameters in one memory; tie them as one parameter (a.weight = b.weight, or "
        "model.tie_weights()), or give each a copy"
    )


def _is_dense(parameter: Tensor) -> bool:
    """Whether it has elements, and fills the memory from its first to its last one; transposed it may be."""
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True)
    )
    return 0 < parameter.numel() >= extent


def lay_out(model: nn.Module) -> None:
    """Copy what is not contiguous, such as a transposed or expanded weight: a rank owns an interval of the flattened one.

    Raises:
        ValueError: what would be copied lies in one memory with another parameter, which it would no longer follow.
    """
    turned = {name for name, parameter in model.named_parameters() if not parameter.is_contiguous()}
    for names in _overlapping(model) if turned else ():
        if not turned.isdisjoint(names):
            _refuse(*names)
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
