"""Where the weights of a model of the caller's lie: on one device, with values, row by row."""

from __future__ import annotations

from torch import nn

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


def lay_out(model: nn.Module) -> None:
    """Copy what is not contiguous, such as a transposed or expanded weight: a rank owns an interval of the flattened one."""
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
