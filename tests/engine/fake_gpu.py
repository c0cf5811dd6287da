"""A GPU that is not there: its tensors say ``cuda:0``, compute on the CPU, and meet no CPU tensor unless a real one could.

Kernels take their torch path on it. Streams have names and keep a log of who waits for whom. There is no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

# While it is imported it wants torch.cuda.Stream to be a class.
from transformers import GenerationMixin  # noqa: F401

from trace_dist.optim.scaled_gradient import ScaledGradient
from trace_dist.utils import dist

GPU = torch.device("cuda", 0)
INDEXED = {Tensor.__getitem__, Tensor.__setitem__}
"""Functions that take indices, and new values, from the CPU too."""


class OnGpu(Tensor):
    """A tensor that says it is on the GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class ScaledOnGpu(OnGpu, ScaledGradient):
    """A gradient for a scaler, on the GPU."""

    @classmethod
    def of(cls, grad: Tensor, model: Any) -> ScaledGradient:
        """As ``ScaledGradient.of``, which does not know that a tensor lies there."""
        kind = cls if isinstance(grad, OnGpu) else ScaledGradient
        return OF(kind, grad, model)  # type: ignore[no-any-return]


OF = ScaledGradient.of.__func__  # type: ignore[attr-defined]


def on_gpu(tensor: Tensor) -> OnGpu:
    """The same memory, on the GPU."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(OnGpu)


def move(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """``tensor.to(...)``."""
    if args and isinstance(args[0], Tensor):
        args, kwargs = (), {"device": args[0].device, "dtype": args[0].dtype}
    here = tensor.device.type
    with torch._C.DisableTorchFunctionSubclass():
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        there = here if device is None else device.type
        moved = tensor if dtype is None else tensor.to(dtype)
        moved = moved.clone() if moved is tensor and (copy or here != there) else moved
        return moved.as_subclass(OnGpu) if there == "cuda" else moved.as_subclass(Tensor)


def place(module: Any, device: str) -> Any:
    """Move a transformers model; its tied weights, which the fake made two, are tied again."""
    module.to(device).tie_weights()
    return module


def attribute(func: Any, tensor: Tensor) -> Any:
    """What a tensor on the GPU says of its place; None for another function."""
    where = {
        Tensor.device.__get__: GPU,  # type: ignore[attr-defined]
        Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
        Tensor.is_cuda.__get__: False,  # type: ignore[attr-defined]  # or kernels would go to Triton
    }
    return where.get(func)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A function of torch; a RuntimeError where its operands are on two devices, as CUDA would raise it."""
    if args and isinstance(args[0], OnGpu) and (answer := attribute(func, args[0])) is not None:
        return answer
    if func is Tensor.to:
        return move(*args, **kwargs)
    if func is Tensor.cpu:
        return move(args[0], "cpu")
    if func is torch._has_compatible_shallow_copy_type:
        return type(args[0]) is type(args[1])
    operands = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    found = any(isinstance(each, OnGpu) for each in operands)
    allowed = func is Tensor.copy_ or (func in INDEXED and isinstance(args[0], OnGpu))
    if found and func is Tensor.numpy:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    if found and not allowed and any(each.dim() for each in operands if not isinstance(each, OnGpu)):
        raise RuntimeError(
            f"{func.__name__}: expected all tensors to be on the same device, found cuda:0 and cpu"
        )
    if kwargs.get("device") is not None:
        found = torch.device(kwargs["device"]).type == "cuda"
        kwargs = {**kwargs, "device": "cpu"}
    elif func is Tensor.copy_:
        found = isinstance(args[0], OnGpu)
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
        if not found:
            return result
        # An operator in place gives back the object that it was given.
        known = {id(each) for each in operands}
        return tree_map(
            lambda each: (
                each.as_subclass(OnGpu) if isinstance(each, Tensor) and id(each) not in known else each
            ),
            result,
        )


class Placement(TorchFunctionMode):
    """Lets ``.to("cuda")`` and ``device="cuda"`` make tensors of this GPU; nothing is pinned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        return run(func, args, kwargs)


class Stream:
    """A stream that does nothing but tell the log."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.device = log, name, GPU

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for an event of {event.stream.name}")

    def record_event(self, _: Any = None) -> Event:
        return Event(self)


class Event:
    """The end of what a stream has been given so far."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.stream.log.append(f"the host waits for {self.stream.name}")


class Streams:
    """The streams of the GPU: ``current`` and those that are made, ``side 1`` ..., and the log of all of them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.present = Stream(self.log, "current")
        self._made = 0

    def make(self, *_: Any, **__: Any) -> Stream:
        self._made += 1
        return Stream(self.log, f"side {self._made}")

    def current(self, *_: Any) -> Stream:
        return self.present

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.present = self.present, stream
        self.log.append(f"in {stream.name}")
        yield
        self.present = before


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    """Inside the block this rank's device is the GPU."""
    streams = Streams()
    patches: dict[str, Callable[..., Any]] = {
        "Stream": streams.make,
        "current_stream": streams.current,
        "stream": streams.on,
    }
    with monkeypatch.context() as patch:
        patch.setattr(dist, "local_device", lambda: GPU)
        patch.setattr(ScaledGradient, "of", ScaledOnGpu.of)
        for name, replacement in patches.items():
            patch.setattr(torch.cuda, name, replacement)
        # A module's parameters become new objects, as their data cannot change the kind of tensor.
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with torch.no_grad(), Placement():
                yield streams
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
