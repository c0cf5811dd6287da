"""Operators and collectives as they were called, without values: to be called again, by themselves, on a device that has some."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Shape:
    """A tensor without values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        """That of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def filled(self) -> Tensor:
        """On the CPU, with numbers between 0.1 and 1, or zeros, which are indices of anything."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        return made.uniform_(0.1, 1.0) if self.dtype.is_floating_point else made.zero_()


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        name: of the operator, as torch writes it.
        operands: positional and named ones, with a ``Shape`` for each tensor.
    """

    name: str
    operands: tuple[Any, dict[str, Any]]

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> Call:
        """That of an operator."""
        return cls(
            str(func),
            tree_map(lambda each: Shape.of(each) if isinstance(each, Tensor) else each, (args, kwargs)),
        )

    @property
    def key(self) -> str:
        """The same for equal calls."""
        return f"{self.name} {self.operands}"

    @property
    def function(self) -> Any:
        """The operator."""
        namespace, name, overload = self.name.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)

    def filled(self) -> tuple[Any, dict[str, Any]]:
        """Operands with values, on the CPU."""

        def fill(each: Any) -> Any:
            if isinstance(each, torch.device):
                return torch.device("cpu")
            return each.filled() if isinstance(each, Shape) else each

        args, kwargs = tree_map(fill, self.operands)
        return args, kwargs


_NAMED = (torch.dtype, torch.layout, torch.memory_format)


def pickled(value: Any) -> bytes:
    """Calls, and what holds them, for another process.

    Torch's types are written by their names in torch. By itself pickle looks for these names in all modules that are loaded, and
    may write one that the other process does not have.
    """
    out = io.BytesIO()
    _Pickler(out).dump(value)
    return out.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _NAMED):
            return of_torch, (str(value).removeprefix("torch."),)
        return NotImplemented


def of_torch(name: str) -> Any:
    """A type of torch's, by its name there."""
    return getattr(torch, name)
