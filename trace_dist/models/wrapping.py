"""Wrappers around a model or its parts, and the names that parameters have without them."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_SEGMENTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""What ``torch.compile`` and torch's checkpoint wrapper put into the names of what they wrap."""


def plain_name(name: str) -> str:
    """A parameter's, buffer's or module's name in the model without wrappers."""
    return ".".join(segment for segment in name.split(".") if segment not in _SEGMENTS)


def is_deepspeed_engine(model: Any) -> bool:
    """Without importing deepspeed, which takes seconds."""
    return any(
        f"{kind.__module__}.{kind.__name__}" == "deepspeed.runtime.engine.DeepSpeedEngine"
        for kind in type(model).__mro__
    )


def peel(model: nn.Module) -> list[nn.Module]:
    """The model and what wraps it, from the outermost wrapper to the model itself.

    Raises:
        ValueError: it is no module, but its parameters, say.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model: is a {type(model).__name__}, not a torch.nn.Module; give the model itself, not its parameters"
        )
    layers = [model]
    while True:
        outer: Any = layers[-1]
        if "_orig_mod" in outer._modules:
            layers.append(outer._orig_mod)
        elif isinstance(outer, DistributedDataParallel | DataParallel) or is_deepspeed_engine(outer):
            layers.append(outer.module)
        else:
            return layers


def refuse_data_parallel() -> NoReturn:
    """Raise ValueError where ``nn.DataParallel`` would copy a layer onto other devices."""
    raise ValueError(
        "model: wrapped by nn.DataParallel, whose copies of a layer get no gradients of their own; start one process for "
        "each GPU (torchrun, deepspeed or accelerate launch), or let this one see a single GPU (CUDA_VISIBLE_DEVICES=0)"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DDP, DataParallel and DeepSpeed engines, in whatever order they lie around it."""
    return peel(model)[-1]
