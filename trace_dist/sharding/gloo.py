"""All-gather on CPUs by messages from shard to gathered copy.

torch's own over gloo receives into a buffer that it allocates for the purpose and copies that to the output, on threads that take
turns with the one that computes. One message per peer moves the same bytes straight into their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Messages(dist.Work):
    """Messages to wait for, all of them."""

    def __init__(self, messages: Sequence[Any]) -> None:
        super().__init__()
        self._messages = messages

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Return when all have arrived; a timeout of 0 is the process group's."""
        messages, self._messages = self._messages, ()
        for message in messages:
            message.wait(timeout)
        return True


def all_gather(
    output_tensor: Tensor,
    input_tensor: Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """``torch.distributed.all_gather_into_tensor`` for tensors on a CPU.

    Args:
        output_tensor: [ranks x n elements], contiguous; the shards in rank order.
        input_tensor: [n elements] this rank's shard, of the same dtype.
        group: the ranks; all of them when None.
        async_op: return at once; ``wait`` of what is returned is when the output holds everything.

    Raises:
        ValueError: the output has another size or dtype.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if output_tensor.numel() != world * input_tensor.numel() or output_tensor.dtype != input_tensor.dtype:
        raise ValueError(
            f"output_tensor: {output_tensor.numel()} elements of {output_tensor.dtype}; {world} shards of "
            f"{input_tensor.numel()} elements of {input_tensor.dtype} need {world * input_tensor.numel()} of that dtype"
        )
    shards = output_tensor.view(world, -1)
    mine = input_tensor.contiguous().view(-1)
    peers = [peer for peer in range(world) if peer != rank and len(mine)]
    # Receivers first: what finds its place prepared is sent at once.
    messages = [dist.irecv(shards[peer], group=group, group_src=peer) for peer in peers]
    messages += [dist.isend(mine, group=group, group_dst=peer) for peer in peers]
    if shards[rank].data_ptr() != mine.data_ptr():  # FSDP2 has it there already
        shards[rank].detach().copy_(mine.detach())
    work = _Messages(messages)
    if async_op:
        return work
    work.wait()
    return None


class AllGather:
    """The same, as FSDP2's ``set_custom_all_gather`` takes it."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of a gathered copy."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """See ``all_gather``."""
        return all_gather(output_tensor, input_tensor, group, async_op)
