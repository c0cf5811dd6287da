"""Values on the meta device, as far as a model's code asks for them.

Mixtures of experts ask which tokens go where (``nonzero``, ``tolist``), and tensors get their sizes from the answers. What
follows from shapes and constants alone (positions, masks, counts) is therefore computed for real, beside the meta tensor that
stands for it. Where a router chooses by scores that nobody knows (``topk``, ``sort``, ``argmax``), its choices are spread
evenly. Every other question is answered with yes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

LARGEST = 2**22
"""Elements of the largest tensor whose values are kept."""

_aten = torch.ops.aten
_BY_SHAPE = (
    *(_aten.zeros_like, _aten.ones_like, _aten.full_like),
    *(_aten.new_zeros, _aten.new_ones, _aten.new_full),
)
# Not known, though a value made on the CPU would be; `torch.tensor(..., device='meta')` is one of them.
_EMPTY = (_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided)
_FILLING = (_aten.fill_, _aten.zero_, _aten.copy_)
_CHOICES = (_aten.topk, _aten.sort, _aten.argsort, _aten.argmax, _aten.argmin, _aten.max, _aten.min)
_SIZED_BY_VALUES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class MetaValues(TorchDispatchMode):
    """While entered, keeps the values of those meta tensors whose values can be known, by storage."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[torch.UntypedStorage, Any]] = {}
        """Address of a storage that lives -> what it would hold, and the end of it."""

    def of(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor, on the CPU, sharing memory with those of its views; None where they are not known."""
        if not tensor.is_meta:
            return tensor
        return self._laid_out(tensor) if _key(tensor) in self._storages else None

    def _laid_out(self, tensor: Tensor) -> Tensor:
        storage, _ = self._storages[_key(tensor)]
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        return torch.empty(0, dtype=tensor.dtype).set_(storage, *place)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Of some tensors no values are known any more, nor of those that share their memory."""
        for tensor in tensors:
            self._storages.pop(_key(tensor), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What ``func`` gives: meta tensors as far as its arguments are, or an answer about values."""
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if str(kwargs.get("device", "meta")) == "meta" and given and not any(x.is_meta for x in given):
            return func(*args, **kwargs)
        if func is _aten.index.Tensor:
            args = (args[0], list(self._positions(args[1])))
        if func is _aten._local_scalar_dense.default:
            value = self.of(args[0])
            return True if value is None else value.item()
        if func is _aten._to_copy.default and str(kwargs.get("device", "meta")) == "cpu" and args[0].is_meta:
            value = self.of(args[0])
            return torch.ones_like(args[0], **kwargs) if value is None else func(value, **kwargs)
        if any(tag in func.tags for tag in _SIZED_BY_VALUES):
            return self._sized_by_values(func, args, kwargs)
        result = func(*args, **kwargs)
        self._follow(func, args, kwargs, result)
        return result

    def _positions(self, indices: list[Tensor | None]) -> Iterator[Tensor | None]:
        """Indices in which each boolean mask has become the positions that it selects."""
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                yield from self.run(_aten.nonzero.default, (index,), {}).unbind(1)
            else:
                yield index

    def _sized_by_values(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator whose result has a size, or is a number, that depends on values."""
        values = self._computed(func, args, kwargs)
        if values is None and func is _aten.nonzero.default:
            shape = args[0].shape
            return args[0].new_empty((prod(shape), len(shape)), dtype=torch.int64)
        if values is None and func is _aten.masked_select.default:
            mask = self.of(args[1])
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
            count = prod(shape) if mask is None else int(mask.expand(shape).sum())
            return args[0].new_empty(count)
        if values is None and func is _aten.equal.default:
            return True
        return func(*args, **kwargs) if values is None else tree_map_only(Tensor, self._on_meta, values)

    def _on_meta(self, value: Tensor) -> Tensor:
        tensor = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
        self._keep(tensor, value)
        return tensor

    def _follow(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Keep the values of a result, and of what was written in place; views share those of their base."""
        given = {_key(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        made = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor) and tensor.is_meta]
        fresh = [tensor for tensor in made if _key(tensor) not in given]
        written = list(written_by(func, args, kwargs))
        if not fresh and not written:
            return
        if func.overloadpacket in _FILLING and self.of(args[0]) is None and _is_whole(args[0]):
            self._keep(args[0], torch.empty(args[0].shape, dtype=args[0].dtype))
        small = sum(tensor.numel() for tensor in fresh) <= LARGEST
        values = self._computed(func, args, kwargs) if small else None
        if values is None:
            self.forget(written)
            if small and func.overloadpacket in _CHOICES:
                self._spread(func, args, fresh)
            return
        found = [value for value in tree_iter(values) if isinstance(value, Tensor)]
        for tensor, value in zip(made, found, strict=True):
            if _key(tensor) not in given:
                self._keep(tensor, value)

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result from values alone, or None where some are not known."""
        if torch.Tag.nondeterministic_seeded in func.tags or func.overloadpacket in _EMPTY:
            return None
        on_cpu = {**kwargs, **({"device": torch.device("cpu")} if "device" in kwargs else {})}
        if func.overloadpacket in _BY_SHAPE:
            on_cpu["device"] = torch.device("cpu")
            values = func(*args, **on_cpu)
        else:
            if any(isinstance(x, Tensor) and self.of(x) is None for x in tree_iter((args, kwargs))):
                return None
            args, on_cpu = tree_map_only(Tensor, self.of, (args, on_cpu))
            try:
                values = func(*args, **on_cpu)
            # Some types that a device takes have no CPU kernel.
            except NotImplementedError:
                return None
        return values

    def _spread(self, func: Any, args: Any, made: list[Tensor]) -> None:
        """The indices that a router chooses: token after token takes the next ones."""
        scores, options = args[0], args[2:] if func is _aten.topk.default else args[1:]
        dim = next((option for option in options if type(option) is int), -1)
        for tensor in made:
            if tensor.dtype != torch.int64 or not scores.ndim:
                continue
            turns = torch.arange(tensor.numel()) % max(scores.shape[dim], 1)
            if tensor.ndim == scores.ndim:
                turns = turns.view(tensor.movedim(dim, -1).shape).movedim(-1, dim)
            self._keep(tensor, turns.reshape(tensor.shape))

    def _keep(self, tensor: Tensor, value: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        end = weakref.ref(storage, lambda _: self._storages.pop(key, None))
        self._storages[key] = torch.UntypedStorage(storage.nbytes()), end
        self._laid_out(tensor).copy_(value)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all that its storage holds, and small enough to be known."""
    return tensor.nbytes == tensor.untyped_storage().nbytes() and tensor.numel() <= LARGEST


def written_by(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors that an operator changes in place."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (tensor for tensor in tree_iter(value) if isinstance(tensor, Tensor))
