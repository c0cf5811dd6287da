"""State dicts of several ranks: whose entries each part has, and where this rank's lie in them.

A part is what ``MaskedAdamW.state_dict`` holds of one rank: ``owned`` (first entry and number per parameter, in the order of
all ranks'), ``state`` and ``values``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from trace_kernels.masked_adamw_8bit import BLOCK_SIZE

from trace_dist.optim.pieces import Piece, covers, pieces_of
from trace_dist.optim.states import State, tensors_of
from trace_dist.sharding.compaction import Support


def owned(supports: Sequence[Support]) -> list[tuple[int, int]]:
    """Which of the masked entries are this rank's: (first, number) per parameter."""
    return [(support.offset, support.runs.num_entries) for support in supports]


def locate(
    entries: Sequence[tuple[Support, State]], parts: Sequence[dict[str, Any]]
) -> dict[str, list[Piece]]:
    """Where this rank's entries lie in the parts.

    Raises:
        ValueError: a part of them is missing, or was kept with other options.
    """
    mine = [_layout(state, support.runs.num_entries) for support, state in entries]
    names = [support.name for support, _ in entries]
    opened = []
    for part in parts:
        counts = [number for _, number in part["owned"]]
        states = [part["state"][index] for index in range(len(names))]
        kept = [{name: (t.dtype, len(t)) for name, t in tensors_of(state).items()} for state in states]
        if kept == [_resized(layout, number) for layout, number in zip(mine, counts, strict=True)]:
            intervals = {
                name: [first, first + number]
                for name, (first, number) in zip(names, part["owned"], strict=True)
            }
            opened.append((_PartFile(names, states, part["values"]), intervals))
    found = {support.name: pieces_of(support, opened) for support, _ in entries}
    if not all(covers(support, found[support.name]) for support, _ in entries):
        raise ValueError(
            "optimizer state: a part of this rank's entries is missing, or has other lengths or types; it was kept in memory on "
            "another rank or number of ranks, or with other state options: load a saved file, with the options it was saved with"
        )
    return found


def _layout(state: State, count: int) -> dict[str, tuple[Any, int]]:
    """dtype and length of each tensor of a state."""
    return _resized({name: (tensor.dtype, 0) for name, tensor in tensors_of(state).items()}, count)


def _resized(layout: dict[str, tuple[Any, int]], count: int) -> dict[str, tuple[Any, int]]:
    """The layout of a state of ``count`` entries that is kept in the same way."""
    blocks = -(-count // BLOCK_SIZE)
    return {
        name: (dtype, blocks if name.endswith("_absmax") else count) for name, (dtype, _) in layout.items()
    }


class _PartFile:
    """A part, read as a safetensors file is."""

    def __init__(self, names: Sequence[str], states: Sequence[State], values: Sequence[Tensor]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for name, state, value in zip(names, states, values, strict=True):
            self._tensors[f"{name}/values"] = value
            self._tensors |= {f"{name}/{key}": tensor for key, tensor in tensors_of(state).items()}

    def keys(self) -> set[str]:
        """Names of the tensors."""
        return set(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors[name]

    get_slice = get_tensor
