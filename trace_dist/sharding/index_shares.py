"""Where all ranks' masked entries are, shared out over the ranks.

To pick all ranks' entries out of its gradient a rank must know where they are: one byte for each single element of the whole
model. On accelerators that is shared out. Each rank keeps an equal part of each decoder block's encoded indices; they are
gathered when the backward pass comes to the block before, and freed when it has left the block.

[Note: one order] A rank may lack a gradient that others have, so nobody can know when all come to some block. The gathers
therefore run in a group of their own, in a fixed order (blocks from the last), each once in every pass: a rank that wants a block
begins all that come before it, and at the end of a pass those that it never wanted. Waiting for one is safe: another rank begins
it no later than it gathers the block's weights, and for those it does not wait for a rank that has come as far.

What was freed and is asked for again, as of a block that runs twice, is picked when the pass ends and all ranks can agree to
gather once more; from then on that rank frees the block's indices at the end only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from trace_kernels.gap_gather import chunk_starts

from trace_dist.masks.gaps import Gaps
from trace_dist.models.blocks import decoder_blocks
from trace_dist.models.wrapping import plain_name
from trace_dist.sharding.comm import Comm
from trace_dist.sharding.support import Support
from trace_dist.utils.devices import sent

BLOCK_BYTES = 2**22
"""Of a block's indices; where none has so many they are not shared out. A model of 5e9 parameters reaches it at 5 %, and so many
indices in all, a quarter of a GiB and more, as one more group takes on an accelerator."""
ALIGNED = 16
"""Bytes at which each tensor begins in what is gathered."""


def worth_sharing(block_bytes: int, device_type: str) -> bool:
    """Whether indices are shared out of which some block has so many. On a CPU they are the mask's own, which is there anyway."""
    return device_type != "cpu" and block_bytes >= BLOCK_BYTES


def share_bytes(num_bytes: int, world: int) -> int:
    """A rank's part of what a block's indices take."""
    return ALIGNED * ceil(num_bytes / (ALIGNED * world))


def blocks_of(module: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Those of some parameters that lie in decoder blocks, by block, in the order of the model."""
    found = []
    for path in decoder_blocks(module):
        start = plain_name(f"{path}.")
        found.append([name for name in names if name.startswith(start)])
    return found


class _Place(NamedTuple):
    """Where one parameter's gaps, and the starts of their chunks, lie among the bytes of a block's indices."""

    words: slice
    word: torch.dtype
    starts: slice | None
    num_units: int
    dtype: torch.dtype


class _Group:
    """One block's indices: this rank's part always, all of them for a while.

    Args:
        supports: of the block; while the indices are there they lie in ``gaps`` and ``starts`` of each.
        gaps: parameter -> its indices, on the CPU.
        comm: the ranks.
        device: where they are wanted.
    """

    def __init__(
        self, supports: Sequence[Support], gaps: Mapping[str, Gaps], comm: Comm, device: torch.device
    ) -> None:
        self._supports, self._comm = supports, comm
        self._places: list[_Place] = []
        self._work: Any = None
        self._whole: Tensor | None = None
        self.stays = False
        """Whether the block has wanted them again after they were freed."""
        parts: list[Tensor] = []
        size = 0

        def put(tensor: Tensor) -> slice:
            nonlocal size
            raw = tensor.contiguous().view(-1).view(torch.uint8)
            parts.append(nn.functional.pad(raw, (0, -len(raw) % ALIGNED)))
            begin, size = size, size + len(parts[-1])
            return slice(begin, begin + len(raw))

        for support in supports:
            encoded = gaps[support.name]
            starts = put(chunk_starts(encoded.words)) if support.decodes else None
            place = _Place(put(encoded.words), encoded.words.dtype, starts, encoded.num_units, encoded.dtype)
            self._places.append(place)
        share = share_bytes(size, comm.world)
        whole = nn.functional.pad(torch.cat(parts), (0, comm.world * share - size))
        self.mine = sent(whole[comm.rank * share : (comm.rank + 1) * share].clone(), device)

    @property
    def is_begun(self) -> bool:
        """Whether they are there, or on their way."""
        return self._whole is not None

    @property
    def has_arrived(self) -> bool:
        """Whether the indices are there."""
        return self.is_begun and self._work is None

    def begin(self) -> None:
        """Gather them. Collective."""
        self._whole = self.mine.new_empty(self._comm.world * len(self.mine))
        self._work = self._comm.gather_indices(self._whole, self.mine)

    def arrive(self) -> None:
        """Wait until they are there."""
        if self._whole is None or self._work is None:
            return
        self._work.wait()
        self._work = None
        for support, place in zip(self._supports, self._places, strict=True):
            words = self._whole[place.words].view(place.word)
            support.gaps = Gaps(words, place.num_units, place.dtype)
            if place.starts is not None:
                support.starts = self._whole[place.starts].view(torch.int64).view(-1, 2)

    def free(self) -> None:
        """Keep this rank's part alone."""
        self.arrive()
        self._whole = None
        for support in self._supports:
            support.gaps = support.starts = None


class IndexShares:
    """The indices of a mask that are shared out, for the backward passes of one attached mask.

    Args:
        module: the model.
        supports: those whose indices are ``away``.
        gaps: parameter -> its indices, on the CPU.
        comm: the ranks.
        device: where they are wanted.
    """

    def __init__(
        self,
        module: nn.Module,
        supports: Sequence[Support],
        gaps: Mapping[str, Gaps],
        comm: Comm,
        device: torch.device,
    ) -> None:
        self._groups: list[_Group] = []
        self._place: dict[str, int] = {}
        self._next = 0
        self._late: list[tuple[Support, Tensor, float]] = []
        self._undo: list[Callable[[], None]] = []
        by_name = {support.name: support for support in supports}
        if supports:
            comm.open_indices()
        blocks = decoder_blocks(module).values()
        for block, names in reversed(list(zip(blocks, blocks_of(module, list(by_name)), strict=True))):
            if names:
                self._place |= dict.fromkeys(names, len(self._groups))
                self._undo.append(self._watch(block, len(self._groups)))
                self._groups.append(_Group([by_name[name] for name in names], gaps, comm, device))

    def _watch(self, block: nn.Module, place: int) -> Callable[[], None]:
        """Learn when the backward pass comes to a block, also on a rank that has no gradient for its masked parameters."""

        @torch.compiler.disable
        def came(*args: Any) -> None:
            # In a pass that is under way activations are recomputed.
            if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
                return
            for tensor in tree_leaves(args[-1]):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self.want(place))

        return block.register_forward_hook(came).remove

    def want(self, place: int) -> None:
        """The backward pass has come to a block; begin to gather its indices and the next block's, free those before."""
        for group in self._groups[:place]:
            if group.has_arrived and not group.stays:
                group.free()
        self._begin(place + 2)

    def _begin(self, stop: int) -> None:
        for group in self._groups[self._next : stop]:
            group.begin()
        self._next = max(self._next, min(stop, len(self._groups)))

    def keep(self, support: Support, dense: Tensor, scale: float) -> bool:
        """Have a support's indices there, or, where they were freed, keep its gradient until ``late`` asks for it.

        Args:
            support: any.
            dense: its gradient, flattened.
            scale: factor on it.

        Returns:
            Whether it was kept.
        """
        if not support.away:
            return False
        place = self._place[support.name]
        group = self._groups[place]
        self.want(place)
        group.arrive()
        if group.is_begun:
            return False
        group.stays = True
        self._late.append((support, dense, scale))
        return True

    def begin_rest(self) -> list[bool]:
        """The pass has ended: begin what was not wanted. Which blocks' indices are wanted once more, for ranks to agree on."""
        self._begin(len(self._groups))
        late = {self._place[support.name] for support, *_ in self._late}
        return [place in late for place in range(len(self._groups))]

    def late(self, agreed: Sequence[bool]) -> Iterator[tuple[Support, Tensor, float]]:
        """Gather once more what some rank wants; the gradients that were kept here. Collective."""
        for group, is_late in zip(self._groups, agreed, strict=True):
            if is_late:
                if not group.is_begun:
                    group.begin()
                else:  # a rank that has them still takes part
                    self._again(group)
                group.arrive()
        yield from self._late

    @staticmethod
    def _again(group: _Group) -> None:
        group.free()
        group.begin()

    def reset(self) -> None:
        """Forget the pass, after its end or after an error: each gather has been called once. Collective."""
        if self._next or self._late:
            self._begin(len(self._groups))
            self._next = 0
        self._late.clear()
        for group in self._groups:
            if group.is_begun:
                group.free()

    def tensors(self) -> list[Tensor]:
        """What this rank keeps."""
        return [group.mine for group in self._groups]

    def close(self) -> None:
        """Remove the hooks."""
        for undo in self._undo:
            undo()
        self._undo.clear()
