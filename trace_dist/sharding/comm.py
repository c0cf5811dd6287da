"""The collectives that the engine itself calls; gathering weights is the sharding library's.

Replace ``ShardedModel.comm`` before a mask is attached to count them, to let them fail, or to stand for ranks that are not there.

[Note: two groups] All gathers of weights, the sharding library's and ours, run in the job's default group. What travels while a
backward pass runs, and what is agreed at its end, has a group of its own. A rank that lacks a gradient exchanges its bucket later
than the others, between other gathers: in one group the ranks would then meet in different collectives, and hang. The gathers of
indices that are shared out ([Note: one order] in sharding/index_shares.py) have another one for the same reason. Ranks that share
rows (sharding/sequence.py) meet in groups of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from trace_dist.utils import dist


class Comm:
    """All ranks of this job, through ``torch.distributed``. Every method is collective."""

    @property
    def rank(self) -> int:
        """This rank."""
        return dist.rank()

    @property
    def world(self) -> int:
        """Number of ranks."""
        return dist.world_size()

    def open(self) -> None:
        """Make the group of ``all_to_all`` and ``any`` ([Note: two groups]), where there is none yet."""
        if self.world > 1:
            dist.exchange_group()

    def open_indices(self) -> None:
        """Make the group of ``gather_indices``, where there is none yet."""
        dist.indices_group()

    def gather_indices(self, whole: Tensor, mine: Tensor) -> Any:
        """Begin to gather every rank's part, [n] uint8, into ``whole``, [ranks x n].

        Returns:
            Something whose ``wait()`` ends when everything has arrived.
        """
        return td.all_gather_into_tensor(whole, mine, group=dist.indices_group(), async_op=True)

    def open_rows(self, size: int) -> None:
        """Make the groups of ``swap_rows``, of ``size`` ranks each, where there are none yet."""
        dist.rows_group(size)

    def swap_rows(self, sent: Tensor, size: int) -> Tensor:
        """Send row i, [size, n], to the i-th rank of this rank's group of ``size``; one row of each of them, in their order."""
        received = torch.empty_like(sent)
        td.all_to_all_single(received, sent, group=dist.rows_group(size))
        return received

    def gather_ahead(self, whole: Tensor, mine: Tensor) -> Any:
        """As ``gather_indices``, of what all ranks want in the order in which they gather weights."""
        return td.all_gather_into_tensor(whole, mine, async_op=True)

    def all_to_all(
        self, received: Tensor, sent: Tensor, receive_sizes: list[int], send_sizes: list[int]
    ) -> Any:
        """Begin to send each rank its part of ``sent``, [sum of send_sizes], and to fill ``received``, [sum of receive_sizes].

        Returns:
            Something whose ``wait()`` ends when everything has arrived, and whose ``is_completed()`` says whether it has.
        """
        group = dist.exchange_group()
        return td.all_to_all_single(received, sent, receive_sizes, send_sizes, group=group, async_op=True)

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags, as many on every rank, some rank has set. The hosts agree; no accelerator is waited for."""
        said = torch.tensor(flags, dtype=torch.int32)
        if self.world > 1:
            td.all_reduce(said, op=td.ReduceOp.MAX, group=dist.exchange_group())
        return [bool(flag) for flag in said.tolist()]

    def all_gather(self, mine: Tensor, sizes: list[int]) -> Tensor:
        """Every rank's 1-D tensor, of ``sizes[rank]`` elements, end to end."""
        return dist.all_gather_uneven(mine, sizes)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        return dist.sum_over_ranks(tensor)

    def max(self, tensor: Tensor) -> Tensor:
        """Largest value over ranks, in place."""
        return dist.largest_over_ranks(tensor)

    def objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order."""
        return dist.gather_objects(value)

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()
