"""Rows that several ranks share: each rank of a group reads a slice of every row.

[Note: slices] Rank i of n takes the tokens [i l, (i + 1) l) of a row of L tokens, l = ceil(L / n), padded at the end. Its slice
says where the tokens are in the whole row, and what follows the last of them, which lies on the next rank. So the losses of the
slices add up to that of the row, and their gradients too, as attention exchanges what it needs (sharding/sequence.py). What lies
behind an example is read by no token of it, and needs no mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_dist.data.encoding import IGNORE

ROW_POSITIONS = "row_positions"
"""What marks a slice among a model's inputs: the position of each token of the whole rows within its example, [rows, n l] int64;
[1, 1] where each row is one example."""


def slice_length(length: int, size: int) -> int:
    """Tokens of a slice of rows of ``length``, which ``size`` ranks share."""
    return -(-length // size)


def sliced(batch: Mapping[str, Tensor], size: int, index: int, pad_id: int = 0) -> dict[str, Tensor]:
    """One rank's slice of a micro-batch ([Note: slices]).

    Args:
        batch: ``input_ids`` and ``labels`` [rows, L] int64, and ``attention_mask``, or ``position_ids`` that begin anew with each
            example of packed rows (data/packing.py).
        size: ranks that share the rows.
        index: of this rank among them.
        pad_id: id for padded positions.

    Returns:
        ``input_ids`` and ``position_ids`` [rows, l], ``labels`` [rows, l + 1], the last of them what follows the slice, and
        ``row_positions``. Other entries are left out.

    Raises:
        ValueError: rows are padded on the left.
    """
    mask = batch.get("attention_mask")
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(
            "attention_mask: rows that ranks share are padded on the right, these are not; set padding_side='right'"
        )
    ids, whole = batch["input_ids"], batch.get("position_ids")
    length = slice_length(ids.shape[1], size)
    missing, first = size * length - ids.shape[1], index * length
    if whole is None:
        # Padding has the last position, as there may be no further one.
        positions = torch.arange(size * length, device=ids.device).clamp(max=ids.shape[1] - 1)[None]
        row_positions = positions.new_zeros(1, 1)
    else:
        positions = row_positions = F.pad(whole, (0, missing))
    mine = slice(first, first + length)
    return {
        "input_ids": F.pad(ids, (0, missing), value=pad_id)[:, mine],
        "position_ids": positions[:, mine],
        "labels": F.pad(batch["labels"], (0, missing + 1), value=IGNORE)[:, first : first + length + 1],
        ROW_POSITIONS: row_positions,
    }
