"""Values of overlays on their way: those of a decoder block travel as one, while the block before is at work.

Each use of a layer needs the values of all ranks ([Note: overlay] in sharding/overlay.py). The first layer of a block that is
used begins to gather those of the next block, in a backward pass of the one before; what is neither of this block nor of that
one is freed. So a pass waits for its first block alone, and there is one collective for each block.

[Note: who comes when] All ranks use some layer of the same blocks in the same order, as they gather the weights of these blocks
in the same order, so these gathers run in the default group, between those of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from trace_dist.models.blocks import decoder_blocks
from trace_dist.models.nf4 import NF4Linear
from trace_dist.models.wrapping import plain_name
from trace_dist.sharding.overlay import Overlay

ALIGNED = 16
"""Bytes at which the values of each layer begin in what is sent."""


class _Block:
    """The overlays of the layers of one block, as they are when their values are asked for.

    Args:
        layers: by the names of their weights.
    """

    def __init__(self, layers: Mapping[str, NF4Linear]) -> None:
        self._layers = layers
        self._work: Any = None
        self._whole: Tensor | None = None  # [ranks x share] uint8; not None iff begun
        self._begins: dict[str, list[int]] = {}

    def _overlays(self) -> dict[str, Overlay]:
        return {name: layer.overlay for name, layer in self._layers.items() if layer.overlay is not None}

    @property
    def has_overlays(self) -> bool:
        """Whether there is anything to gather."""
        return bool(self._overlays())

    def begin(self) -> None:
        """Begin to gather, unless it has been begun. Collective."""
        overlays = self._overlays()
        if self._whole is not None or not overlays:
            return
        comm = next(iter(overlays.values())).comm
        sizes = [
            [ALIGNED * ceil(split * each.values.element_size() / ALIGNED) for split in each.splits]
            for each in overlays.values()
        ]
        ends = [list(accumulate(of_rank, initial=0)) for of_rank in zip(*sizes, strict=True)]
        share = max(of_rank[-1] for of_rank in ends)
        for place, name in enumerate(overlays):
            self._begins[name] = [rank * share + of_rank[place] for rank, of_rank in enumerate(ends)]
        raw = [each.values.view(torch.uint8) for each in overlays.values()]
        mine = raw[0].new_zeros(share)
        slots = [mine[at : at + len(part)] for at, part in zip(ends[comm.rank], raw, strict=False)]
        torch._foreach_copy_(slots, raw)
        self._whole = mine.new_empty(comm.world * share)
        self._work = comm.gather_ahead(self._whole, mine)

    def values(self, name: str, overlay: Overlay) -> Tensor:
        """The values of a layer's overlay, those of all ranks, end to end; waits for them."""
        self._arrive()
        if self._whole is None:
            raise AssertionError(f"{name}: its overlay is used before it is gathered")
        itemsize = overlay.values.element_size()
        found = [
            self._whole[at : at + split * itemsize]
            for at, split in zip(self._begins[name], overlay.splits, strict=True)
        ]
        return torch.cat([part.view(overlay.values.dtype) for part in found])

    def free(self) -> None:
        """Forget what was gathered."""
        self._arrive()
        self._whole = None

    def _arrive(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


class OverlayGathers:
    """Gathers the overlays of a model ahead of their use.

    Args:
        module: the model.
        layers: its NF4 layers, by the names of their weights.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, NF4Linear]) -> None:
        starts = [plain_name(f"{path}.") for path in decoder_blocks(module)]
        blocks: dict[str, dict[str, NF4Linear]] = {}
        for name, layer in layers.items():
            block = next((start for start in starts if name.startswith(start)), name)
            blocks.setdefault(block, {})[name] = layer
        self._layers = layers
        self._blocks = [_Block(members) for members in blocks.values()]
        self._place = {name: place for place, members in enumerate(blocks.values()) for name in members}
        self._at = (-1, False)  # the block that is at work, and whether in a backward pass

    def values(self, name: str) -> Tensor:
        """The values of a layer's overlay, those of all ranks, end to end. Collective."""
        place, in_backward = self._place[name], torch._C._current_graph_task_id() != -1
        if self._at != (place, in_backward):
            self._at = (place, in_backward)
            self._come_to(place, -1 if in_backward else 1)
        return self._blocks[place].values(name, self._layers[name].overlay)

    def _come_to(self, place: int, towards: int) -> None:
        block = self._blocks[place]
        rest = self._blocks[place + 1 :] if towards > 0 else reversed(self._blocks[:place])
        following = next((other for other in rest if other.has_overlays), None)
        for other in self._blocks:
            if other is not block and other is not following:
                other.free()
        block.begin()
        if following is not None:
            following.begin()

    def forget(self) -> None:
        """Free everything: somebody may write into an overlay."""
        self._at = (-1, False)
        for block in self._blocks:
            block.free()
